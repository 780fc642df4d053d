"""Claims are checked rightly, on numbers made up for it."""

import pytest

from lmfusion.experiments.ablation.claims import check_claim
from lmfusion.experiments.ablation.config import ClaimConfig
from lmfusion.experiments.ablation.report import markdown

START = {name: {"text_loss": 3.0, "text_accuracy": 0.8} for name in ("none", "shallow", "deep")}
FINAL = {
    "none": {"diffusion_loss": 0.5, "text_loss": 3.5, "text_accuracy": 0.8, "image_accuracy": 0.1},
    "shallow": {"diffusion_loss": 0.4, "text_loss": 3.0, "text_accuracy": 0.7, "image_accuracy": 0.1},
    "deep": {"diffusion_loss": 0.3, "text_loss": 3.0, "text_accuracy": 0.8, "image_accuracy": None},
}


def found(metric, final=FINAL, **kind):
    return check_claim(ClaimConfig("a claim", metric, **kind), final, START).found


@pytest.mark.parametrize(
    ("metric", "order", "expected"),
    [
        ("diffusion_loss", ["deep", "shallow", "none"], True),
        ("diffusion_loss", ["deep", "none", "shallow"], False),
        ("diffusion_loss", ["none", "deep"], False),
        ("text_loss", ["shallow", "deep", "none"], True),  # equals
        ("text_loss", ["deep", "shallow", "none"], True),
        ("text_accuracy", ["deep", "shallow"], True),  # more is better
        ("text_accuracy", ["shallow", "deep"], False),
        ("image_accuracy", ["none", "shallow"], True),
        ("image_accuracy", ["deep", "none"], None),
        ("caption_loss", ["deep", "none"], None),
    ],
)
def test_order(metric, order, expected):
    assert found(metric, order=order) is expected


def test_a_violated_pair_outweighs_an_unknown_one():
    final = {"a": {"caption_loss": 2.0}, "b": {"caption_loss": 1.0}, "c": {}}
    assert found("caption_loss", final, order=["a", "b", "c"]) is False
    assert found("caption_loss", final, order=["b", "a", "c"]) is None


def test_keeps_is_a_matter_of_the_last_bit():
    assert found("text_loss", keeps=["shallow", "deep"]) is True
    assert found("text_loss", keeps=["deep", "none"]) is False
    nearly = FINAL | {"deep": {"text_loss": 3.0000000000000004}}
    assert found("text_loss", nearly, keeps=["deep"]) is False
    assert found("text_loss", {}, keeps=["deep"]) is None


def test_loses():
    assert found("text_loss", loses=["none"]) is True
    assert found("text_loss", loses=["none", "deep"]) is False
    assert found("text_accuracy", loses=["shallow"]) is True
    assert found("text_accuracy", loses=["none"]) is False


def test_the_report_has_findings_and_numbers():
    order = ClaimConfig("deeper is better", "diffusion_loss", order=["deep", "none"])
    wrong = ClaimConfig("accuracy | falls", "text_accuracy", loses=["deep"])
    keeps = ClaimConfig("nothing is lost", "text_loss", keeps=["deep"])
    unknown = ClaimConfig("images are right", "image_accuracy", order=["deep", "none"])
    spent = {"step": 8, "tokens": 12345, "seconds": 7.2}
    variants = {
        name: {"final": final | spent, "start": START[name], "trained_parameters": 1_500_000}
        for name, final in FINAL.items()
    }
    text = markdown("Title", variants, [check_claim(claim, FINAL, START) for claim in (order, wrong, keeps, unknown)])
    assert "| deeper is better | diffusion loss | deep ≤ none | found | deep 0.3; none 0.5 |" in text
    assert r"| accuracy \| falls | accuracy | deep: worse than before the first step | NOT found |" in text
    assert "| found | deep at the start 3; deep 3 |" in text
    assert "| not measured | deep –; none 0.1 |" in text
    assert "| none | 1.50 M | 0.5000 | 3.5000 | 0.800 | 0.100 | 8 | 12,345 | 7 |" in text
    assert "Before the first step, all variants: text loss 3.0000, accuracy 0.800." in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metric": "loss", "order": ["a", "b"]}, "must be one of diffusion_loss, .* got 'loss'"),
        ({"metric": "text_loss"}, "must have one of order, keeps and loses, got none"),
        (
            {"metric": "text_loss", "order": ["a", "b"], "keeps": ["a"]},
            "must have one of order, keeps and loses, got order and keeps",
        ),
        ({"metric": "text_loss", "order": ["a"]}, "order of the claim .* must name at least 2 variants, got 1"),
        ({"metric": "text_loss", "loses": []}, "loses of the claim .* must name at least 1 variants, got 0"),
        ({"metric": "diffusion_loss", "keeps": ["a"]}, "use order"),
    ],
)
def test_invalid_claims_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ClaimConfig("a claim", **values)
