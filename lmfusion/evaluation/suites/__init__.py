"""Evaluation suites, one file each, and the table that finds them by name.

To add one: write a class with the members of `Suite`, list it in SUITES, and give `EvalConfig` a field of its name.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from lmfusion.evaluation.results import SuiteResult
    from lmfusion.model.modeling import LMFusion


class Suite(Protocol):
    """One kind of evaluation, with its configuration."""

    config_type: ClassVar[type]
    """Dataclass of the suite's keys in a recipe."""

    def __init__(self, config: Any) -> None: ...

    def check(self) -> None:
        """Look for data, weights and packages before a model is loaded.

        Raises ValueError or OSError, with the way out, if something is missing.
        """

    def run(self, model: "LMFusion", folder: Path) -> "SuiteResult":
        """Evaluate `model`. Files of the suite, such as its images, go into `folder`, which may not exist yet."""
        ...


SUITES = {
    "language": "lmfusion.evaluation.suites.language:LanguageSuite",
    "images": "lmfusion.evaluation.suites.images:ImagesSuite",
    "captions": "lmfusion.evaluation.suites.captions:CaptionsSuite",
    "shapes": "lmfusion.evaluation.suites.shapes:ShapesSuite",
    "edits": "lmfusion.evaluation.suites.edits:EditsSuite",
    "geneval": "lmfusion.evaluation.suites.geneval:GenEvalSuite",
}
"""module:class of each suite, in the order in which suites run. Modules are imported when a suite is used."""


def load_suite(name: str) -> type[Suite]:
    """The class of a suite in SUITES."""
    module, _, class_name = SUITES[name].partition(":")
    suite: type[Suite] = getattr(import_module(module), class_name)
    return suite
