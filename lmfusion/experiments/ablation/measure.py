"""How does a variant do, and when is it asked? What it says of plain text and draws, measured while it is trained."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmfusion.evaluation.metrics.bootstrap import bootstrap
from lmfusion.evaluation.results import Score
from lmfusion.evaluation.scoring import text_loss
from lmfusion.evaluation.suites.image_settings import drawing_values
from lmfusion.evaluation.suites.language import LanguageConfig, check_language, run_language
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
"""In the folder of a variant: a line each measured step."""
DRAWINGS = "drawings.png"
"""In the folder of a variant: what it drew, in the order of the held-out captions."""


class Measurer:
    """What is asked of every variant. Reads texts and tasks at once; raises ValueError where one is missing."""

    def __init__(self, config: MeasureConfig) -> None:
        self.config = config
        self._texts = read_texts(config.texts)
        self._language: LanguageConfig | None = None
        if config.task is not None:
            self._language = LanguageConfig([config.task], compare_with_base=False, verify=False)
            check_language(self._language)

    def identity(self) -> dict[str, Any]:
        """What the numbers depend on besides the model: equal ones can be compared."""
        texts_sha256 = hashlib.sha256("\n\n".join(self._texts).encode()).hexdigest()
        drawings = to_values(self.config.drawings)
        return {"texts_sha256": texts_sha256, "task": self.config.task, "drawings": drawings}

    def text(self, model: "LMFusion", folder: Path) -> dict[str, float | None]:
        """Loss of plain text, and accuracy at the task with its bootstrap interval, by the model's text side."""
        values: dict[str, float | None] = {"text_loss": text_loss(model, self._texts)}
        if self._language is not None:
            accuracy = _accuracy(self._language.tasks[0], run_language(model, self._language, folder).scores)
            values |= {"text_accuracy": accuracy.value}
            values |= {"text_accuracy_low": accuracy.low, "text_accuracy_high": accuracy.high}
        return values

    def drawings(self, model: "LMFusion", folder: Path) -> dict[str, float | None]:
        """Share of the drawings that show what their held-out caption says. The pictures go into `folder`."""
        config = self.config.drawings
        source = Shapes(model.codec.config.image_size, "test")
        wanted = [source.example(i).description for i in range(config.num_images)]
        images = model.draw([str(description) for description in wanted], **drawing_values(config))
        save_grid(make_grid(images, num_columns=min(8, len(images))), folder / DRAWINGS)
        right = np.array([check(description, image) for description, image in zip(wanted, images, strict=True)], float)
        low, high = bootstrap(right)
        return {"drawings_right": float(right.mean()), "drawings_right_low": low, "drawings_right_high": high}


class MeasuredTrainer(Trainer):
    """A training run that is measured before its first step, at each validation and after its last step."""

    def __init__(self, config: RunConfig, measurer: Measurer) -> None:
        super().__init__(config)
        self._measurer = measurer
        self._lines = JsonLines(self.folder / MEASURED)
        if measurer.config.drawings.num_images:
            render(Scene(()), self.model.codec.config.image_size)  # complain of too small images now, not at the end

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
            return  # its text cannot change; the last step shows that it did not
        with self._averaged():
            values = self._measurer.text(self.model, self.folder)
            if is_last and self._measurer.config.drawings.num_images:
                values |= self._measurer.drawings(self.model, self.folder)
        self._write(values)

    def _write(self, values: dict[str, float | None]) -> None:
        self._lines.append({"step": self.step, **values})
        self._lines.sync()


def read_texts(path: str | None) -> list[str]:
    """The plain texts of a file, or those that come with lmfusion. Raises ValueError where there are none."""
    if path is None:
        return list(PLAIN_TEXTS)
    if not Path(path).is_file():
        raise ValueError(f"measure.texts is {path}, and there is no such file; leave it out for lmfusion's own texts")
    try:
        content = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"measure.texts, {path}, is not UTF-8: {error}") from error
    texts = [text.strip() for text in content.split("\n\n") if text.strip()]
    if not texts:
        raise ValueError(f"measure.texts, {path}, holds no text; write some, divided by blank lines")
    return texts


def _accuracy(task: str, scores: tuple[Score, ...]) -> Score:
    """The task's accuracy. Raises ValueError for a group of tasks, and for a task that is not scored by "acc"."""
    found = [score for score in scores if score.name.split()[-1] == "acc"]
    if len(found) != 1:
        raise ValueError(
            f"measure.task is {task}, with the scores {', '.join(score.name for score in scores) or 'none'}; name one "
            'multiple-choice task with the metric "acc", or null'
        )
    return found[0]
