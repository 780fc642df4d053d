"""Tests that a model trained on digits generates one on the page and says which.

The model is that of `make demo` in runs/demo/run/model, or the one in LMFUSION_DEMO_MODEL. With
LMFUSION_PAGE_SCREENSHOT=docs/images/page.png the test also writes the screenshots of the documentation.
"""

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from lmfusion.model.modeling import LMFusion
from lmfusion.synthetic.digits import NAMES, answer_closing, answer_opening
from tests.lmfusion.serving.page.browser import CHROMIUM, DRIVER, MISSING, Browser
from tests.lmfusion.serving.page.conftest import Page

pytest.importorskip("gradio")
pytest.importorskip("selenium")
pytest.importorskip("sklearn")
MODEL = Path(os.environ.get("LMFUSION_DEMO_MODEL", Path(__file__).parents[4] / "runs" / "demo" / "run" / "model"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING),
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason=f"no trained model in {MODEL}: make demo"),
]


SEEDS = 5
AROUND_THE_IMAGE = """
const bot = [...document.querySelectorAll('#chat .bot')].pop(), picture = bot.querySelector('img.image');
const texts = [...bot.querySelectorAll('.message-content')].filter((part) => part.innerText.trim());
const follows = (part) => picture.compareDocumentPosition(part) & Node.DOCUMENT_POSITION_FOLLOWING;
const words = (parts) => parts.map((part) => part.innerText).join(' ').trim();
return [words(texts.filter((part) => !follows(part))), words(texts.filter(follows))];
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    from lmfusion.cli.demo import EXAMPLES

    model = LMFusion.from_pretrained(MODEL)
    page = Page(
        model, tmp_path_factory.mktemp("page"), name="lmfusion demo", examples=EXAMPLES, prompt_mode="last_message"
    )
    yield page
    page.close()


@pytest.fixture
def browser(page):
    window = Browser("--window-size=1280,1120", "--force-device-scale-factor=1.5")
    window.open(page.url)
    yield window
    window.close()


def draw(browser, digit, seed):
    """Ask in a new conversation. Returns the texts before and after the image, and the digit that the judge reads."""
    from lmfusion.synthetic.digit_classifier import DigitClassifier

    browser.click("#clear")
    browser.wait(lambda: not browser.all("#chat .bot"))
    browser.set("seed", seed)
    browser.ask(f"Draw a {NAMES[digit]}, then say what you drew.")
    [before, after] = browser.driver.execute_script(AROUND_THE_IMAGE)
    return before, after, DigitClassifier().classify([Image.open(io.BytesIO(browser.image()))])[0]


def test_draws_a_seven_and_says_so(browser):
    browser.set("random-seed", False)
    answers = [draw(browser, 7, seed) for seed in range(SEEDS)]
    for before, after, _ in answers:
        assert before == answer_opening(7), "text comes first"
        assert after == answer_closing(7), "and text after the picture"
    read = [digit for *_, digit in answers]
    assert read.count(7) >= 0.8 * SEEDS, f"sevens are read as {read}"
    assert browser.complaints() == []

    if target := os.environ.get("LMFUSION_PAGE_SCREENSHOT"):
        path = Path(target)
        draw(browser, 7, read.index(7))
        browser.ask("Can you draw a three?")
        browser.driver.save_screenshot(str(path))
        browser.click("#dark")
        browser.click("button[role=tab]:nth-of-type(2)")
        browser.click("#gallery button:has(img)")
        browser.wait(lambda: "Seed" in browser.text("#details"))
        browser.driver.save_screenshot(str(path.with_stem(f"{path.stem}-dark")))
