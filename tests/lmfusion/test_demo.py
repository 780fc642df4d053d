"""Does the demo run from end to end, and does its report say what happened?"""

import json
import re

import pytest
from PIL import Image

from lmfusion.cli import main
from lmfusion.data.digits import NAMES, Digits
from lmfusion.demo.judge import Judge
from lmfusion.demo.report import captioned, line_chart, render_picture, table
from lmfusion.demo.run import run_demo


@pytest.fixture(scope="module")
def demo(tiny_llama, tmp_path_factory):
    """Output folder and overrides of a demo on a tiny random LLM, with too few steps to learn anything."""
    folder = tmp_path_factory.mktemp("demo")
    overrides = [f"model.base={tiny_llama}", "model.image.hidden_size=16", "train.num_steps=4", "train.log_every=2"]
    overrides += [
        "train.warmup_steps=1",
        "train.batch_tokens=256",
        "data.row_tokens=256",
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
    assert summary["train_seconds"] > 0 and summary["images_per_second"] > 0
    assert {"python", "torch", "lmfusion"} <= summary["versions"].keys()
    page = (folder / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page), "the page must carry everything it shows"
    assert page.count("<img") >= 10 * 10 + 10 * 10
    assert page.count("<svg") == 2
    assert "identical" in page and "CHANGED" not in page
    assert Image.open(folder / "digits.png").size[0] == 520


def test_a_finished_demo_does_not_train_again(demo, capsys):
    folder, overrides, summary = demo
    before = (folder / "run" / "metrics.jsonl").read_text()
    assert main(["demo", "--output", str(folder), *overrides]) == 0
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
