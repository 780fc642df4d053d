"""What is evaluated? One model and the suites that a recipe names, read as YAML with `key.sub=value` overrides."""

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
    """One evaluation. Raises ValueError without a suite, and for an unknown device or dtype."""

    output: str
    """Folder of eval.json, index.html and pictures. Suites that it holds with the same settings are not run again."""
    model: str
    """Folder of a trained model."""
    base: str | None = None
    """Where its base LLM is now, if it has moved since the model was saved."""
    codec_path: str | None = None
    """The same of the folder of its autoencoder."""
    device: str = "auto"
    """"auto" (a GPU where there is one), "cpu" or "cuda"."""
    dtype: str | None = None
    """Of the weights; None: as they were saved."""
    language: LanguageConfig | None = None
    """Tasks for the text side. A suite that is left out is not run; `{}` runs it as its defaults say."""

    images: ImagesConfig | None = None
    """Drawings of prompts, compared with real images and with the prompts."""
    captions: CaptionsConfig | None = None
    """Descriptions of images, compared with references."""
    shapes: ShapesConfig | None = None
    """Drawings of coloured shapes, judged exactly."""
    edits: EditsConfig | None = None
    """Edits of coloured shapes, judged exactly."""
    geneval: GenEvalConfig | None = None
    """Drawings in GenEval's layout, for its own judge."""

    def __post_init__(self) -> None:
        self.output = str(Path(self.output).expanduser())
        if self.device not in DEVICES:
            raise ValueError(f"device is {short_repr(self.device)}; it must be one of {', '.join(DEVICES)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(
                f"dtype is {short_repr(self.dtype)}; it must be one of {', '.join(DTYPES)}, or null for that of the file"
            )
        if not self.suites:
            raise ValueError(f"the recipe names no suite; give one of {', '.join(SUITES)}, as `language: {{}}`")

    @property
    def suites(self) -> dict[str, Any]:
        """Settings of the suites that are to be run, by name, in order."""
        return {name: getattr(self, name) for name in SUITES if getattr(self, name) is not None}
