"""Does the demo run from end to end, and does its report say what happened?"""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from lmfusion.cli import main
from lmfusion.experiments.demo.chat_eval import Reply, openings_as_taught
from lmfusion.experiments.demo.report import captioned, conversations, line_chart, render_picture, table
from lmfusion.experiments.demo.run import run_demo
from lmfusion.model.modeling import LMFusion
from lmfusion.synthetic.digit_classifier import Judge
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
    assert page.count("<svg") == 3
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


def test_judge_reads_real_digits():
    digits = Digits("test")
    read = Judge().read([digits[i].load_image() for i in range(100)])
    assert sum(a == b for a, b in zip(read, digits.labels, strict=False)) >= 95
    blank = Image.new("L", (8, 8))
    assert len(set(Judge().read([blank, blank]))) == 1


def test_wrong_captions_say_what_was_expected():
    image = Image.new("L", (8, 8))
    shown = captioned([(image, "a three", "a three"), (image, "a <four>", "a five")])
    assert shown.count("right") == 1 and shown.count("wrong") == 1
    assert "expected: a &lt;four&gt;" in shown and "<four>" not in shown


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


def test_wrong_replies_are_shown_in_full():
    shown = conversations([reply(), reply(after="I drew a <four>.")], "EngineRequest")
    assert "1 of 2" in shown and shown.count("<tr>") == 2 and shown.count('class="talk"') == 1
    assert "&lt;four&gt;" in shown and "Here is &lt;a&gt; seven:" in shown and 'class="wrong"' in shown
    assert 'class="right"' in conversations([reply()], "EngineRequest")


def test_the_recipes_system_prompt_is_that_of_the_conversations():
    config = load_config(Path(__file__).parents[4] / "recipes" / "digits.yaml")
    assert config.model.chat_system_prompt == SYSTEM_PROMPT


@pytest.mark.slow
def test_conversations_are_in_the_words_of_the_llm_itself():
    config = {"kind": "pixels", "channels": 1, "image_size": 8}
    model = LMFusion.from_llm(smollm2(), {"hidden_size": 64, "patch_coder": {"kind": "linear"}}, config)
    model.config.chat_system_prompt = SYSTEM_PROMPT
    assert openings_as_taught(model) >= 0.95
    answers = model.generate([question for question, _ in QUESTIONS], chat=True, max_new_tokens=40, batch_size=len(QUESTIONS))
    same = [str(answer).startswith(said) for answer, (_, said) in zip(answers, QUESTIONS, strict=True)]
    assert sum(same) >= 0.8 * len(QUESTIONS)  # in another dtype it may choose another word


def test_chart_and_table():
    chart = line_chart([0, 5, 10], [3.0, 2.0, 1.0], "loss")
    assert chart.count("<polyline") == 2 and "step 0" in chart and ">10<" in chart
    assert line_chart([0], [1.0], "loss") == ""
    assert '<td class="number">1,234</td>' in table([("n", 1234)])


def test_picture_has_a_column_a_digit():
    white = Image.new("L", (8, 8), 255)
    black = Image.new("L", (8, 8), 0)
    picture = render_picture({name: [white] * 3 for name in NAMES}, {name: [black] * 5 for name in NAMES})
    assert picture.getpixel((26, 26)) == 255 and picture.getpixel((26, picture.height - 26)) == 0
