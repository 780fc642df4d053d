"""What does the page say of scores?"""

from lmfusion.evaluation.report import _shared_details
from lmfusion.evaluation.results import Score


def test_what_holds_for_a_few_scores_is_not_said_of_all():
    drawn = [
        Score(f"distance {i}", 1.0, details={"extractor": "a", "sampler": "ddpm", "guidance": i}) for i in range(4)
    ]
    control = [Score(f"control {i}", 1.0, details={"extractor": "a", "real images instead": "b"}) for i in range(2)]
    assert _shared_details([*drawn, *control]) == {"extractor": "a", "sampler": "ddpm"}
    assert _shared_details(drawn[:1]) == {}
