"""Tests the page in a browser: streamed text and previews, uploads, stop, reload, settings, errors, tabs."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from lmfusion.generation.worker import QueueFull
from lmfusion.images.png import read_settings
from tests.lmfusion.serving.conftest import wait_until
from tests.lmfusion.serving.page.browser import CHROMIUM, DRIVER, MISSING, Browser
from tests.lmfusion.serving.page.conftest import Page

pytest.importorskip("gradio")
pytest.importorskip("selenium")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)

SECONDS_PER_STEP = 0.01


@pytest.fixture(scope="module")
def page(model, tmp_path_factory):
    page = Page(model, tmp_path_factory.mktemp("page"), seconds_per_step=SECONDS_PER_STEP, examples=["Hello"])
    yield page
    page.close()


@pytest.fixture(scope="module")
def window():
    window = Browser("--window-size=1280,900")
    yield window
    window.close()


@pytest.fixture
def browser(window, page):
    """The page, just opened, with short answers. The test fails on console messages and on requests to other hosts."""
    window.open(page.url)
    window.set("max-tokens", 40)
    yield window
    assert window.complaints() == []


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(path)
    return path


def set_image_options(browser, **settings):
    for name, value in {"min-images": 1, **settings}.items():
        browser.set(name, value)


def read(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def test_text_is_streamed_and_an_image_sharpens(browser, page, tmp_path):
    set_image_options(browser, **{"num-steps": 30, "preview-every": 2})
    browser.ask("Draw a seven")
    seen = browser.seen()
    lengths = [len(text) for text in seen["texts"]]
    assert sum(b > a for a, b in itertools.pairwise(lengths)) >= 2, "text must grow while it is generated"
    assert len(seen["previews"]) >= 2, "the image must change before it is finished"
    assert not browser.all("#chat img.preview, #chat progress"), "the finished image replaces the preview"
    image = browser.one("#chat .bot img.image")
    assert image.size["width"] == 192 and image.get_attribute("naturalWidth") == "8"
    assert image.value_of_css_property("image-rendering") == "pixelated"

    path = tmp_path / "image.png"
    path.write_bytes(browser.image())
    settings = read_settings(path)
    assert settings["prompt"] == "Draw a seven" and settings["num_steps"] == 30
    assert str(settings["seed"]) == browser.setting("seed"), "a random seed is shown"
    assert page.engine.num_slots_used == 0


def test_the_same_seed_generates_the_same_image(browser):
    set_image_options(browser, **{"random-seed": False, "seed": 7, "max-tokens": 2})
    images = []
    for seed in (7, 7, 8):
        browser.click("#clear")
        browser.wait(lambda: not browser.all("#chat .bot"))
        browser.set("seed", seed)
        browser.ask("Draw")
        images.append(read(browser.image()))
    assert images[0].shape == (8, 8)
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])


def test_uploaded_images_are_answered_and_remembered(browser, page, model, photo, monkeypatch):
    prompts = []
    submit = page.engine.submit
    monkeypatch.setattr(page.engine, "submit", lambda prompt, *rest: prompts.append(prompt) or submit(prompt, *rest))
    browser.set("max-images", 0)
    browser.upload(photo)
    browser.ask("What is this?")
    [seen] = browser.all("#chat .user img.image")
    assert seen.get_attribute("naturalWidth") == "8", "the image is shown as the model sees it"
    assert browser.text("#chat .bot").strip()
    browser.ask("And now?")
    assert [prompt.num_images for prompt in prompts] == [1, 1], "the image stays in the conversation"
    words = [
        model.tokenizer.decode([i for part in prompt.parts if isinstance(part, list) for i in part])
        for prompt in prompts
    ]
    assert words[1].startswith(words[0].removesuffix("a:")) and "And now?" in words[1]
    for mode in ("last_message", "raw_text"):
        browser.click(f"#prompt-mode input[value={mode}]")
        browser.ask("Alone")
        assert prompts[-1].num_images == 0
    chat, raw = ([i for part in prompt.parts for i in part] for prompt in prompts[2:])
    assert model.tokenizer.decode(chat).endswith("u:Alone;a:") and model.tokenizer.decode(raw).endswith("Alone")


def test_stop_keeps_what_was_generated(browser, page):
    set_image_options(browser, **{"num-steps": 200, "preview-every": 1, "max-tokens": 10})
    browser.send("Draw slowly")
    browser.wait(lambda: browser.all("#chat img.preview"))
    browser.click("#box .stop-button")
    browser.wait_for_answer()
    assert "Stopped." in browser.text("#chat .bot") and "stopped at step" in browser.text("#chat .bot")
    assert browser.all("#chat img.preview") and not browser.all("#chat progress")
    wait_until(lambda: page.engine.num_slots_used == 0)
    browser.set("num-steps", 3)
    browser.ask("Draw quickly")
    assert browser.image()


def test_a_reload_cancels_and_starts_afresh(browser, page, monkeypatch):
    set_image_options(browser, **{"num-steps": 3})
    browser.ask("Draw")
    assert any((page.folder / "images").iterdir())
    monkeypatch.setattr(page, "seconds_per_step", 0.2)
    browser.set("num-steps", 200)
    browser.send("Draw for a long time")
    browser.wait(lambda: browser.all("#chat img.preview"))
    browser.open(page.url)
    left = browser.complaints()  # from gradio, about the connection that the reload closed
    assert all("abort" in line or "errored out" in line for line in left)
    wait_until(lambda: page.engine.num_running == 0 and page.engine.num_slots_used == 0)
    wait_until(lambda: not any((page.folder / "images").iterdir()))
    monkeypatch.undo()
    assert not browser.all("#chat .bot")
    browser.set("max-tokens", 5)
    browser.ask("Hello again")
    assert browser.text("#chat .bot").strip()


def test_uploads_that_are_not_images_are_refused(browser, page, tmp_path):
    script = tmp_path / "script.png"
    script.write_bytes(b"<script>alert(1)</script>")
    browser.one("#box input[type=file]").send_keys(str(script))
    browser.wait(lambda: "must be JPEG, PNG or WEBP" in browser.text("body"), seconds=10)
    assert all("415" in line for line in browser.complaints())
    browser.ask("Hello")
    assert browser.text("#chat .bot").strip()


def test_errors_are_shown(browser, page, tmp_path, monkeypatch):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and no image at all")
    browser.upload(broken)
    browser.one("#box textarea").send_keys("What is this?\n")
    browser.wait(lambda: "broken.png is" in browser.text("body"))
    assert not browser.all("#chat .bot")
    assert browser.one("#box textarea").get_attribute("value") == "What is this?", "the message must not be lost"

    browser.open(page.url)
    set_image_options(browser, **{"max-images": 0})
    browser.one("#box textarea").send_keys("Draw\n")
    browser.wait(lambda: "min_images must be at most max_images (0), got 1" in browser.text("body"))
    browser.open(page.url)
    browser.set("max-tokens", 50)
    browser.one("#box textarea").send_keys("x" * 300 + "\n")
    browser.wait(lambda: "context of 256" in browser.text("body"))

    def full(*_):
        raise QueueFull("64 requests are waiting, which is the limit")

    monkeypatch.setattr(page.worker, "submit", full)
    browser.open(page.url)
    browser.one("#box textarea").send_keys("Hello\n")
    browser.wait(lambda: "64 requests are waiting" in browser.text("body"))


def test_the_gallery_shows_how_an_image_was_generated(browser, tmp_path):
    set_image_options(browser, **{"num-steps": 5, "random-seed": False, "seed": 11})
    browser.ask("Draw <b>one</b>")
    browser.set("seed", 12)
    browser.ask("Draw two")
    browser.click("#clear")
    browser.click("button[role=tab]:nth-of-type(2)")
    browser.wait(lambda: len(browser.all("#gallery button img")) == 2)
    for index, (prompt, seed) in enumerate([("Draw two", 12), ("Draw <b>one</b>", 11)]):
        browser.wait(lambda: browser.all("#gallery button:has(img)"))
        browser.driver.execute_script("arguments[0].click()", browser.all("#gallery button:has(img)")[index])
        browser.wait(lambda prompt=prompt: prompt in browser.text("#details"))
        assert f"Seed\t{seed}" in browser.text("#details") and "Steps\t5" in browser.text("#details")
    assert browser.one("#download").is_displayed()


def test_two_tabs_at_the_same_time(browser, page, monkeypatch):
    monkeypatch.setattr(page, "seconds_per_step", 0.05)
    set_image_options(browser, **{"num-steps": 100, "max-tokens": 5})
    first = browser.driver.current_window_handle
    browser.send("Draw here")
    browser.driver.switch_to.new_window("tab")
    browser.open(page.url)
    set_image_options(browser, **{"num-steps": 5, "max-tokens": 5})
    browser.send("Draw there")
    wait_until(lambda: page.engine.num_running == 2)
    browser.wait_for_answer()
    assert len(browser.all("#chat .bot img.image")) == 1
    browser.driver.close()
    browser.driver.switch_to.window(first)
    browser.wait_for_answer()
    assert len(browser.all("#chat .bot img.image")) == 1, "closing one tab leaves the other alone"


def test_an_example_is_a_click(browser):
    browser.click("#chat button.example")
    browser.wait(lambda: browser.all("#chat .bot"))
    browser.wait_for_answer()
    assert browser.text("#chat .user").strip() == "Hello"
