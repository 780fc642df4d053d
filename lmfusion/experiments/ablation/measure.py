"""Measures a variant while it is trained: loss of plain text, accuracy at a task, and accuracy of generated images."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmfusion.evaluation.metrics.bootstrap import bootstrap
from lmfusion.evaluation.results import Score
from lmfusion.evaluation.scoring import text_loss
from lmfusion.evaluation.suites.image_settings import sampling_options
from lmfusion.evaluation.suites.language import LanguageConfig, LanguageSuite
from lmfusion.experiments.ablation.config import MeasureConfig
from lmfusion.experiments.ablation.texts import PLAIN_TEXTS
from lmfusion.images.grid import make_grid, save_grid
from lmfusion.synthetic.shape_reader import check
from lmfusion.synthetic.shapes import Scene, Shapes, render
from lmfusion.training.config import RunConfig
from lmfusion.training.trainer import Trainer
from lmfusion.training.validation import Validation
from lmfusion.utils.config_values import to_values
from lmfusion.utils.json_lines import JsonLines

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

MEASURED = "measured.jsonl"
"""File in the folder of a variant, with a line per measured step."""
IMAGES = "images.png"
"""File in the folder of a variant: its generated images, in the order of the held-out captions."""


class Measurer:
    """The measurements of every variant. Reads texts and tasks at once; raises ValueError if one is missing."""

    def __init__(self, config: MeasureConfig) -> None:
        self.config = config
        self._texts = read_texts(config.texts)
        self._language: LanguageSuite | None = None
        if config.task is not None:
            self._language = LanguageSuite(LanguageConfig([config.task], compare_with_base=False, verify=False))
            self._language.check()

    def identity(self) -> dict[str, Any]:
        """What the numbers depend on besides the model. Numbers can be compared if it is equal."""
        texts_sha256 = hashlib.sha256("\n\n".join(self._texts).encode()).hexdigest()
        return {"texts_sha256": texts_sha256, "task": self.config.task, "images": to_values(self.config.images)}

    def text(self, model: "LMFusion", folder: Path) -> dict[str, float | None]:
        """Loss of plain text, and accuracy at the task with its bootstrap interval, by the model's text tower."""
        values: dict[str, float | None] = {"text_loss": text_loss(model, self._texts)}
        if self._language is not None:
            accuracy = _accuracy(self._language.config.tasks[0], self._language.run(model, folder).scores)
            values |= {"text_accuracy": accuracy.value}
            values |= {"text_accuracy_low": accuracy.low, "text_accuracy_high": accuracy.high}
        return values

    def images(self, model: "LMFusion", folder: Path) -> dict[str, float | None]:
        """Share of generated images that show what their held-out caption says. A picture of all goes into `folder`."""
        config = self.config.images
        source = Shapes(model.codec.config.image_size, "test")
        descriptions = [source.example(i).description for i in range(config.num_images)]
        images = model.draw([str(description) for description in descriptions], **sampling_options(config))
        save_grid(make_grid(images, num_columns=min(8, len(images))), folder / IMAGES)
        right = np.array(
            [check(description, image) for description, image in zip(descriptions, images, strict=True)], float
        )
        low, high = bootstrap(right)
        return {"image_accuracy": float(right.mean()), "image_accuracy_low": low, "image_accuracy_high": high}


class MeasuredTrainer(Trainer):
    """A training run that is measured before its first step, at each validation, and after its last step."""

    def __init__(self, config: RunConfig, measurer: Measurer) -> None:
        super().__init__(config)
        self._measurer = measurer
        self._lines = JsonLines(self.folder / MEASURED)
        if measurer.config.images.num_images:
            # Raises for images that are too small now, rather than after the last step
            render(Scene(()), self.model.codec.config.image_size)

    def run(self, max_steps: int | None = None) -> bool:
        try:
            return super().run(max_steps)
        finally:
            self._lines.close()

    def _before_steps(self) -> None:
        self._lines.resume(self.step if self.step else -1)
        if not self.step:
            self.model.eval()
            self._write(self._measurer.text(self.model, self.folder))

    def _validate(self, validation: Validation) -> None:
        super()._validate(validation)
        is_last = self.step == self.config.train.num_steps
        if self.model.frozen_text and not is_last:
            return  # frozen text cannot change; the last step proves that it did not
        with self._averaged():
            values = self._measurer.text(self.model, self.folder)
            if is_last and self._measurer.config.images.num_images:
                values |= self._measurer.images(self.model, self.folder)
        self._write(values)

    def _write(self, values: dict[str, float | None]) -> None:
        self._lines.append({"step": self.step, **values})
        self._lines.sync()


def read_texts(path: str | None) -> list[str]:
    """The plain texts of a file, or those that come with lmfusion. Raises ValueError if there are none."""
    if path is None:
        return list(PLAIN_TEXTS)
    if not Path(path).is_file():
        raise ValueError(f"measure.texts must be an existing file, got {path}; leave it out for lmfusion's own texts")
    try:
        content = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"measure.texts must be UTF-8, got {path}: {error}") from error
    texts = [text.strip() for text in content.split("\n\n") if text.strip()]
    if not texts:
        raise ValueError(f"measure.texts must hold texts, separated by blank lines, got none in {path}")
    return texts


def _accuracy(task: str, scores: tuple[Score, ...]) -> Score:
    """The accuracy of the task. Raises ValueError for a group of tasks, and for a task without the metric "acc"."""
    found = [score for score in scores if score.name.split()[-1] == "acc"]
    if len(found) != 1:
        raise ValueError(
            f'measure.task must be one multiple-choice task with the metric "acc", or null, got {task} with the scores '
            f"{', '.join(score.name for score in scores) or 'none'}"
        )
    return found[0]
