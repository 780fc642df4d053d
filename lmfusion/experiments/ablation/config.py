"""What is compared? One training recipe, its variants, what is measured of each, and what is claimed of them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmfusion.evaluation.suites.image_settings import image_options
from lmfusion.synthetic.shapes import NUM_SAMPLES
from lmfusion.training.config import RunConfig
from lmfusion.utils.config_values import check_least, from_values, short_repr

METRICS = {
    "diffusion_loss": "lower",
    "caption_loss": "lower",
    "text_loss": "lower",
    "text_accuracy": "higher",
    "drawings_right": "higher",
}
"""What can be measured of a variant, and which of two values is the better one."""
TEXT_METRICS = ("text_loss", "text_accuracy")
OWNED = {
    "output": "it is <output of the ablation>/<name of the variant>",
    "validation.every": "measure.every says it",
}
"""Keys of a run that the ablation sets itself."""


@dataclass
class DrawingsConfig:
    """Pictures that a variant draws of held-out captions after its last step, and that are judged exactly.

    The captions are those of the source "shapes", whose pictures can be read.
    """

    num_images: int = 0
    """One a caption; 0: none are drawn."""
    sampler: str = "dpm-solver"
    num_steps: int = 20
    guidance_scale: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, "measure.drawings", num_images=0)
        image_options(self, "measure.drawings")
        if self.num_images > NUM_SAMPLES["test"]:
            raise ValueError(
                f"measure.drawings.num_images is {self.num_images}; there are {NUM_SAMPLES['test']} held-out captions"
            )


@dataclass
class MeasureConfig:
    """What is measured of every variant, on the same things each time."""

    every: int
    """Steps between two measurements: of the losses on `base.validation`'s images and of plain text. The last step of
    every variant must be one of them."""
    texts: str | None = None
    """UTF-8 file of plain texts that are not trained on, divided by blank lines; None: lmfusion's own."""
    task: str | None = "everyday"
    """Multiple-choice task, with the metric "acc", of `lmfusion eval`'s language suite: its own "everyday", a name of
    lm-evaluation-harness's or a YAML file. None: no task is asked."""
    drawings: DrawingsConfig = field(default_factory=DrawingsConfig)

    def __post_init__(self) -> None:
        check_least(self, "measure", every=1)


@dataclass
class OrderingConfig:
    """One claim about the variants after their last steps: exactly one of `order`, `keeps` and `loses`."""

    claim: str
    """In words."""
    metric: str
    order: list[str] | None = None
    """Variants from the best to the worst; equals may stand in any order."""
    keeps: list[str] | None = None
    """Variants whose value is, to the last bit, that before their first step."""
    loses: list[str] | None = None
    """Variants whose value is worse than before their first step."""

    def __post_init__(self) -> None:
        name = f"the ordering {short_repr(self.claim)}"
        if self.metric not in METRICS:
            raise ValueError(f"{name} has the metric {short_repr(self.metric)}; it must be one of {', '.join(METRICS)}")
        given = [key for key in ("order", "keeps", "loses") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"{name} gives {' and '.join(given) or 'nothing'}; give one of order, keeps and loses")
        if len(self.variants) < (2 if self.order is not None else 1):
            raise ValueError(f"{name} names {len(self.variants)} variants in {given[0]}, which compares nothing")
        if self.order is None and self.metric not in TEXT_METRICS:
            raise ValueError(
                f"{name} compares {self.metric} with its value before the first step, which is known of "
                f"{', '.join(TEXT_METRICS)} alone; use order"
            )

    @property
    def variants(self) -> list[str]:
        return self.order or self.keeps or self.loses or []


@dataclass
class AblationConfig:
    """One ablation.

    Raises ValueError, naming the variant, for one that is no training run, and for claims about what is not there.
    """

    output: str
    """Folder: a training run a variant in <output>/<variant>, and ablation.json, .md, .png and .svg."""
    base: dict
    """The training recipe that all variants share: the keys of `lmfusion train`, without output."""
    variants: dict[str, dict]
    """Name of each variant: the keys of the recipe that it changes, as "train.learning_rate": 1e-3."""
    measure: MeasureConfig
    orderings: list[OrderingConfig] = field(default_factory=list)
    """Claims that are reported as found or not found."""
    title: str = "Ablation"
    """Of the plot and the table."""

    def __post_init__(self) -> None:
        self.output = str(Path(self.output).expanduser())
        if not self.variants:
            raise ValueError("variants is empty; name at least one, as {deep: {model.image.separation: deep}}")
        for name in self.variants:
            if not isinstance(name, str) or not name or Path(name).name != name or name.startswith("."):
                raise ValueError(f"variants has the name {short_repr(name)}, which is to be the name of a folder")
        runs = self.runs()
        for ordering in self.orderings:
            missing = [name for name in ordering.variants if name not in self.variants]
            if missing:
                raise ValueError(
                    f"the ordering {ordering.claim!r} names {', '.join(missing)}, which is no variant "
                    f"({', '.join(self.variants)})"
                )
            if ordering.metric == "drawings_right" and not self.measure.drawings.num_images:
                raise ValueError(
                    f"the ordering {ordering.claim!r} needs drawings; set measure.drawings.num_images above 0"
                )
        for name, run in runs.items():
            self._check_measured(name, run)

    def runs(self) -> dict[str, RunConfig]:
        """The training run of each variant."""
        for key, reason in OWNED.items():
            if _has(self.base, key):
                raise ValueError(f"base.{key} is given, but {reason}; leave it out")
        return {name: self._run(name) for name in self.variants}

    def _run(self, name: str) -> RunConfig:
        values: dict[str, Any] = copy.deepcopy(self.base)
        values["output"] = str(Path(self.output) / name)
        for key, value in self.variants[name].items():
            if key in OWNED:
                raise ValueError(f"variants.{name}.{key} is given, but {OWNED[key]}; leave it out")
            _set(values, str(key), value, f"variants.{name}")
        _set(values, "validation.every", self.measure.every, "base")
        try:
            return from_values(RunConfig, values)
        except ValueError as error:
            raise ValueError(f"variants.{name} is no training run: {error}") from error

    def _check_measured(self, name: str, run: RunConfig) -> None:
        every, train = self.measure.every, run.train
        if not run.validation.sources:
            raise ValueError("base.validation.sources is empty; name the held-out images that losses are measured on")
        if train.num_steps % every:
            raise ValueError(
                f"variants.{name} has {train.num_steps} steps, no multiple of measure.every, {every}: its last step "
                "would not be measured"
            )
        if every % train.log_every:
            raise ValueError(
                f"measure.every is {every}, no multiple of train.log_every, {train.log_every}, of variants.{name}: "
                "how many tokens and seconds a measured step took would not be known"
            )


def _has(values: Mapping[str, Any], key: str) -> bool:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.get(parent) or {}
        if not isinstance(values, Mapping):
            return False
    return last in values


def _set(values: dict[str, Any], key: str, value: Any, name: str) -> None:
    """Set the key "section.sub" of nested `values`. Raises ValueError where a section is a value."""
    *parents, last = key.split(".")
    for i, parent in enumerate(parents):
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ValueError(f"{name}.{key}: {'.'.join(parents[: i + 1])} is a value and has nothing below it")
    values[last] = copy.deepcopy(value)
