"""The demo runs from end to end, and its report says what happened."""

import base64
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from lmfusion.cli import main
from lmfusion.experiments.demo.chat_eval import Reply, openings_as_taught
from lmfusion.experiments.demo.report import digits_picture, loss_charts, render_report
from lmfusion.experiments.demo.run import run_demo
from lmfusion.model.modeling import LMFusion
from lmfusion.synthetic.digit_classifier import DigitClassifier
from lmfusion.synthetic.digits import NAMES, QUESTIONS, SYSTEM_PROMPT, Digits
from lmfusion.training.config import load_config
from tests.lmfusion.conftest import build_tokenizer
from tests.lmfusion.model.test_modeling import smollm2

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m.role[0] + '\n' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>a\n{% endif %}"
)


@pytest.fixture(scope="module")
def demo(tiny_llama, tmp_path_factory):
    """Output folder and overrides of a demo on a tiny random LLM, with too few steps to learn anything."""
    folder, llm = tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("llm")
    shutil.copytree(tiny_llama, llm, dirs_exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(llm)
    overrides = [f"model.base={llm}", "model.image.hidden_size=16", "train.num_steps=4", "train.log_every=2"]
    overrides += [
        "train.warmup_steps=1",
        "train.batch_tokens=256",
        "data.seq_len=256",
        "sample.every=4",
        "train.device=cpu",
    ]
    return folder, overrides, run_demo(folder, overrides)


def test_summary_and_report(demo):
    folder, _, summary = demo
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["text_identical"] is True
    assert 0 <= summary["digit_accuracy"] < 0.9 and 0 <= summary["caption_accuracy"] < 0.8  # nothing was learned
    assert summary["held_out_images"] == 359 and summary["train_images"] == 1438
    assert summary["chat_accuracy"] == summary["openings_as_taught"] == 0
    assert 0 <= summary["answers_without_image"] <= 1
    assert summary["train_seconds"] > 0 and summary["images_per_second"] > 0
    assert {"python", "torch", "lmfusion"} <= summary["versions"].keys()
    saved = json.loads((folder / "run" / "model" / "config.json").read_text())
    assert saved["chat_system_prompt"] == SYSTEM_PROMPT
    page = (folder / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page), "the page must carry everything it shows"
    assert page.count("<img") >= 10 * 10 + 10 * 10
    assert page.count("data:image/svg+xml;base64,") == 3
    assert "Draw ..., then say what you drew." in page and "What is the capital of France?" in page
    assert "identical" in page and "CHANGED" not in page
    assert Image.open(folder / "digits.png").size[0] == 520


def test_a_finished_demo_does_not_train_again(demo, capsys):
    folder, overrides, summary = demo
    before = (folder / "run" / "metrics.jsonl").read_text()
    assert main(["demo", "--no-page", "--output", str(folder), *overrides]) == 0
    assert (folder / "run" / "metrics.jsonl").read_text() == before
    again = json.loads((folder / "summary.json").read_text())
    assert again == summary
    assert "continuing from step 4" in capsys.readouterr().out


def test_the_classifier_reads_real_digits():
    digits = Digits("test")
    read = DigitClassifier().classify([digits[i].load_image() for i in range(100)])
    assert sum(a == b for a, b in zip(read, digits.labels, strict=False)) >= 95
    blank = Image.new("L", (8, 8))
    assert len(set(DigitClassifier().classify([blank, blank]))) == 1


def reply(**changed):
    values = {"request": "Draw a seven.", "digit": 7, "before": "Here is <a> seven:", "image": Image.new("L", (8, 8))}
    return Reply(**{**values, "after": "I drew a handwritten seven.", "read_as": 7, **changed})


def test_a_reply_is_right_when_text_image_and_text_are():
    assert reply().is_right
    for changed in (
        {"before": " "},
        {"image": None, "read_as": None},
        {"read_as": 1},
        {"after": ""},
        {"after": "I drew a handwritten four."},
        {"after": "I drew a seven or a four."},
    ):
        assert not reply(**changed).is_right, changed


def report(**changed):
    """The report of a demo that generated and captioned nothing."""
    summary = {"model": "<Llama>", "text_identical": True, "train_seconds": 1.5, "versions": {"torch": "2"}}
    shares = ("digit_accuracy", "caption_accuracy", "chat_accuracy", "chat_accuracy_in_other_words")
    counts = ("trainable_parameters", "train_images", "text_parameters", "held_out_images")
    summary |= dict.fromkeys(shares, 0.5) | dict.fromkeys(counts, 1234)
    empty = {"metrics": [], "real": {}, "generated": {}, "captions_right": [], "captions_wrong": [], "replies": {}}
    rest = {"questions": [], "text_checks": [], "times": {}}
    return render_report(**{"summary": summary, **empty, **rest, **changed})


def test_wrong_captions_say_what_was_expected():
    image = Image.new("L", (8, 8))
    page = report(captions_right=[(image, "a three", "a three")], captions_wrong=[(image, "a <four>", "")])
    assert page.count('<span class="right">a three</span>') == 1
    assert '<span class="wrong">(nothing)</span><br>expected: a &lt;four&gt;' in page and "<four>" not in page
    assert "<p>None.</p>" in report() and "<p>None.</p>" not in page


def test_wrong_replies_are_shown_in_full():
    page = report(replies={"<Title>": [reply(), reply(after="I drew a <four>.")]})
    assert "<td>1 of 2</td>" in page and page.count("<td>Draw ....</td>") == 1 and page.count('class="reply"') == 1
    assert "&lt;four&gt;" in page and "Here is &lt;a&gt; seven:" in page and "<h3>&lt;Title&gt;</h3>" in page
    assert '<span class="wrong">' in page and '<span class="right">' not in page
    assert '<span class="right">' in report(replies={"Title": [reply()]})
    assert "∅" in report(replies={"Title": [reply(image=None, read_as=None)]})


def test_numbers_and_markup_of_the_summary():
    page = report(questions=[("<who>", "an <answer>", False)], times={"train": 12.5})
    assert "&lt;Llama&gt; was given an image tower of 1,234 parameters" in page and "<Llama>" not in page
    assert "<td>&lt;who&gt;</td><td>an &lt;answer&gt;</td><td>GENERATED</td>" in page
    assert '<td>train</td><td class="number">12.5</td>' in page
    assert "<td>version of torch</td><td>2</td>" in page


def test_the_recipes_system_prompt_is_that_of_the_conversations():
    config = load_config(Path(__file__).parents[4] / "recipes" / "digits.yaml")
    assert config.model.chat_system_prompt == SYSTEM_PROMPT


@pytest.mark.slow
def test_conversations_are_in_the_words_of_the_llm_itself():
    config = {"kind": "pixels", "channels": 1, "image_size": 8}
    model = LMFusion.from_llm(smollm2(), {"hidden_size": 64, "patch_coder": {"kind": "linear"}}, config)
    model.config.chat_system_prompt = SYSTEM_PROMPT
    assert openings_as_taught(model) >= 0.95
    answers = model.generate(
        [question for question, _ in QUESTIONS], chat=True, max_new_tokens=40, batch_size=len(QUESTIONS)
    )
    same = [str(answer).startswith(said) for answer, (_, said) in zip(answers, QUESTIONS, strict=True)]
    assert sum(same) >= 0.8 * len(QUESTIONS)  # in another dtype it may choose another word


def test_there_is_a_chart_for_each_loss():
    metrics = [{"step": step, "diffusion_loss": 3.0, "lm_loss": 2.0, "boi_loss": 1.0} for step in (0, 5, 10)]
    charts = loss_charts(metrics)
    assert [chart.title.split()[0] for chart in charts] == ["diffusion", "language", "BOI"]
    svg = base64.b64decode(charts[0].source.removeprefix("data:image/svg+xml;base64,")).decode()
    assert ">diffusion loss (images)<" in svg and ">steps<" in svg and ">10<" in svg
    assert loss_charts(metrics[:1]) == []


def test_the_picture_has_a_column_per_digit():
    white = Image.new("L", (8, 8), 255)
    black = Image.new("L", (8, 8), 0)
    picture = digits_picture({name: [white] * 3 for name in NAMES}, {name: [black] * 5 for name in NAMES})
    assert picture.getpixel((26, 26)) == 255 and picture.getpixel((26, picture.height - 26)) == 0
