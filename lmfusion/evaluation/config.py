"""The configuration of an evaluation: a model and its suites, read from YAML with `key.sub=value` overrides."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmfusion.evaluation.suites import SUITES
from lmfusion.evaluation.suites.captions import CaptionsConfig
from lmfusion.evaluation.suites.edits import EditsConfig
from lmfusion.evaluation.suites.geneval import GenEvalConfig
from lmfusion.evaluation.suites.images import ImagesConfig
from lmfusion.evaluation.suites.language import LanguageConfig
from lmfusion.evaluation.suites.shapes import ShapesConfig
from lmfusion.utils.config_values import short_repr

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class EvalConfig:
    """One evaluation. Raises ValueError for a recipe without suites, and for an unknown device or dtype."""

    output: str
    """Folder for eval.json, index.html and images. Suites that it already holds, with the same settings, are kept."""
    model: str
    """Folder of a trained model."""
    base: str | None = None
    """Path of the base LLM, if it has moved since the model was saved."""
    codec_path: str | None = None
    """Path of the autoencoder, if it has moved."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu" or "cuda"."""
    dtype: str | None = None
    """Of the weights; None: as they were saved."""
    language: LanguageConfig | None = None
    """Language tasks. A suite that is left out does not run; `{}` runs it with its defaults."""
    images: ImagesConfig | None = None
    """Images generated from prompts, compared with real images and with the prompts."""
    captions: CaptionsConfig | None = None
    """Captions of images, compared with reference captions."""
    shapes: ShapesConfig | None = None
    """Images of coloured shapes, checked exactly."""
    edits: EditsConfig | None = None
    """Edits of images of coloured shapes, checked exactly."""
    geneval: GenEvalConfig | None = None
    """Images in GenEval's layout, to be scored by GenEval's own scripts."""

    def __post_init__(self) -> None:
        self.output = str(Path(self.output).expanduser())
        if self.device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {short_repr(self.device)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(
                f"dtype must be one of {', '.join(DTYPES)}, or null for that of the file, got {short_repr(self.dtype)}"
            )
        if not self.suites:
            raise ValueError(
                f"the recipe must name at least one suite, such as `language: {{}}`: one of {', '.join(SUITES)}"
            )

    @property
    def suites(self) -> dict[str, Any]:
        """Configurations of the suites to run, by name, in the order in which they run."""
        return {name: getattr(self, name) for name in SUITES if getattr(self, name) is not None}
