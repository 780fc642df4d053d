"""The page of an evaluation gives shared details once, and shows any text as text."""

import pytest
from PIL import Image

from lmfusion.evaluation.report import render_report, shared_details
from lmfusion.evaluation.results import SampleImage, Score, SuiteResult, Table

HOSTILE = '<b>bold</b> & "quoted"'


def test_details_of_a_few_scores_are_not_shared():
    generated = [
        Score(f"distance {i}", 1.0, details={"extractor": "a", "sampler": "ddpm", "guidance": i}) for i in range(4)
    ]
    control = [Score(f"control {i}", 1.0, details={"extractor": "a", "real images instead": "b"}) for i in range(2)]
    assert shared_details([*generated, *control]) == {"extractor": "a", "sampler": "ddpm"}
    assert shared_details(generated[:1]) == {}


@pytest.fixture
def values():
    """What eval.json holds, with markup wherever a user's text may stand."""
    suite = {"seconds": 3.4, "made": {"device": HOSTILE, "date": "today", "commit": None}}
    model = {"path": HOSTILE, "sha256": "0", "base": None, "text_parameters": 1, "image_parameters": 2, "dtype": "x"}
    head = {"command": f"lmfusion eval {HOSTILE}", "model": model, "lmfusion": "0", "commit": None, "device": "cpu"}
    return {**head, "config_sha256": "1", "versions": {"torch": "2"}, "date": "now", "suites": {HOSTILE: suite}}


def test_any_text_is_shown_as_text(values, tmp_path):
    (tmp_path / "captions").mkdir()
    Image.new("L", (300, 10)).save(tmp_path / "captions" / "a b.png")
    result = SuiteResult(
        "captions",
        (Score(HOSTILE, 0.5, 0.25, 0.75, 1234, {"data": HOSTILE}),),
        {"prompt": HOSTILE},
        tables=(Table(HOSTILE, (HOSTILE,), ((HOSTILE,),)),),
        pictures=(SampleImage("a b.png", HOSTILE),),
    )
    page = render_report(values, [result], tmp_path)
    assert "<b>bold" not in page
    assert page.count("&lt;b&gt;bold&lt;/b&gt; &amp; &#34;quoted&#34;") == 15
    assert '<figure class="large"><a href="captions/a%20b.png">' in page
    assert "<h2>Captions</h2>" in page
    assert '<td class="number">0.5</td><td class="number">[0.25, 0.75]</td><td class="number">1,234</td>' in page
