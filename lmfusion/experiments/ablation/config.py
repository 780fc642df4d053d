"""The configuration of an ablation: a training recipe, its variants, their measurements, and claims about them."""

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
    "image_accuracy": "higher",
}
"""Metrics of a variant, and which of two values is better."""
TEXT_METRICS = ("text_loss", "text_accuracy")
OWNED = {
    "output": "it is always <output of the ablation>/<name of the variant>",
    "validation.every": "measure.every sets it",
}
"""Keys of a run that the ablation sets itself, and how."""


@dataclass
class MeasuredImagesConfig:
    """Images that a variant generates from held-out captions after its last step, each checked exactly.

    The captions are those of the source "shapes", whose images can be read from their pixels.
    """

    num_images: int = 0
    """One per caption; 0: none."""
    sampler: str = "dpm-solver"
    num_steps: int = 20
    guidance_scale: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, "measure.images", num_images=0)
        image_options(self, "measure.images")
        if self.num_images > NUM_SAMPLES["test"]:
            raise ValueError(
                f"measure.images.num_images must be at most {NUM_SAMPLES['test']}, the held-out captions, got "
                f"{self.num_images}"
            )


@dataclass
class MeasureConfig:
    """The measurements of every variant, on the same data each time."""

    every: int
    """Steps between measurements of the losses on `base.validation` and of plain text. The number of steps of every
    variant must be a multiple of it."""
    texts: str | None = None
    """UTF-8 file of plain texts that are not trained on, separated by blank lines; None: lmfusion's own."""
    task: str | None = "everyday"
    """A multiple-choice task with the metric "acc", as for the suite `language` of `lmfusion eval`: "everyday", a name
    of lm-evaluation-harness or a YAML file. None: no task."""
    images: MeasuredImagesConfig = field(default_factory=MeasuredImagesConfig)

    def __post_init__(self) -> None:
        check_least(self, "measure", every=1)


@dataclass
class ClaimConfig:
    """One claim about the variants after their last step, with exactly one of `order`, `keeps` and `loses`."""

    claim: str
    """The claim in words."""
    metric: str
    order: list[str] | None = None
    """Variants from the best to the worst. Equal ones may be in any order."""
    keeps: list[str] | None = None
    """Variants whose value is the same as before their first step, to the last bit."""
    loses: list[str] | None = None
    """Variants whose value is worse than before their first step."""

    def __post_init__(self) -> None:
        name = f"the claim {short_repr(self.claim)}"
        if self.metric not in METRICS:
            raise ValueError(f"metric of {name} must be one of {', '.join(METRICS)}, got {short_repr(self.metric)}")
        given = [key for key in ("order", "keeps", "loses") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"{name} must have one of order, keeps and loses, got {' and '.join(given) or 'none'}")
        least = 2 if self.order is not None else 1
        if len(self.variants) < least:
            raise ValueError(f"{given[0]} of {name} must name at least {least} variants, got {len(self.variants)}")
        if self.order is None and self.metric not in TEXT_METRICS:
            raise ValueError(
                f"{given[0]} of {name} must be about {' or '.join(TEXT_METRICS)}, which are measured before the first "
                f"step too, got {self.metric}; use order"
            )

    @property
    def variants(self) -> list[str]:
        return self.order or self.keeps or self.loses or []


@dataclass
class AblationConfig:
    """One ablation.

    Raises ValueError, naming the variant, for a variant that is not a valid training run, and for claims about variants
    or metrics that do not exist.
    """

    output: str
    """Folder of a training run per variant in <output>/<variant>, and of ablation.json, .md, .png and .svg."""
    base: dict
    """The training recipe that all variants share: the keys of `lmfusion train` without output."""
    variants: dict[str, dict]
    """Keys of the recipe that each variant changes, such as "train.learning_rate": 1e-3, by name of the variant."""
    measure: MeasureConfig
    claims: list[ClaimConfig] = field(default_factory=list)
    """Claims about the outcome, which are reported as found or not found."""
    title: str = "Ablation"
    """Of the plot and the table."""

    def __post_init__(self) -> None:
        self.output = str(Path(self.output).expanduser())
        if not self.variants:
            raise ValueError(
                "variants must name at least one, such as {deep: {model.image.separation: deep}}, got none"
            )
        for name in self.variants:
            if not isinstance(name, str) or not name or Path(name).name != name or name.startswith("."):
                raise ValueError(f"names of variants must be valid names of folders, got {short_repr(name)}")
        runs = self.runs()
        for claim in self.claims:
            missing = [name for name in claim.variants if name not in self.variants]
            if missing:
                raise ValueError(
                    f"the claim {claim.claim!r} must name variants out of {', '.join(self.variants)}, got "
                    f"{', '.join(missing)}"
                )
            if claim.metric == "image_accuracy" and not self.measure.images.num_images:
                raise ValueError(f"measure.images.num_images must be above 0 for the claim {claim.claim!r}, got 0")
        for name, run in runs.items():
            self._check_measured(name, run)

    def runs(self) -> dict[str, RunConfig]:
        """The training run of each variant."""
        for key, reason in OWNED.items():
            if _has(self.base, key):
                raise ValueError(f"base.{key} must be left out: {reason}")
        return {name: self._run(name) for name in self.variants}

    def _run(self, name: str) -> RunConfig:
        values: dict[str, Any] = copy.deepcopy(self.base)
        values["output"] = str(Path(self.output) / name)
        for key, value in self.variants[name].items():
            if key in OWNED:
                raise ValueError(f"variants.{name}.{key} must be left out: {OWNED[key]}")
            _set(values, str(key), value, f"variants.{name}")
        _set(values, "validation.every", self.measure.every, "base")
        try:
            return from_values(RunConfig, values)
        except ValueError as error:
            raise ValueError(f"variants.{name} must be a valid training run: {error}") from error

    def _check_measured(self, name: str, run: RunConfig) -> None:
        every, train = self.measure.every, run.train
        if not run.validation.sources:
            raise ValueError("base.validation.sources must name held-out images to measure losses on, got none")
        if train.num_steps % every:
            raise ValueError(
                f"train.num_steps of variants.{name} must be a multiple of measure.every, {every}, so that its last "
                f"step is measured, got {train.num_steps}"
            )
        if every % train.log_every:
            raise ValueError(
                f"measure.every must be a multiple of train.log_every, {train.log_every}, of variants.{name}, so that "
                f"tokens and seconds are known at measured steps, got {every}"
            )


def _has(values: Mapping[str, Any], key: str) -> bool:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.get(parent) or {}
        if not isinstance(values, Mapping):
            return False
    return last in values


def _set(values: dict[str, Any], key: str, value: Any, name: str) -> None:
    """Set the key "section.sub" of nested `values`. Raises ValueError if a section is a value."""
    *parents, last = key.split(".")
    for i, parent in enumerate(parents):
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ValueError(f"{name}.{key} must be below a section, but {'.'.join(parents[: i + 1])} is a value")
    values[last] = copy.deepcopy(value)
