"""The suite `edits`: instruction following on held-out edits of coloured shapes, each result checked exactly.

Results are read from their pixels by `lmfusion.synthetic.shape_reader`, so no network takes part. An edit is right if
the change was made and everything else stayed: the same shapes, colours, sizes and cells. An added shape may be in any
free cell. A model that copies its input image keeps everything, so the share of copies is reported as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from lmfusion.evaluation.results import SampleImage, SuiteResult, Table
from lmfusion.evaluation.suites.image_settings import image_options, sampling_options
from lmfusion.evaluation.suites.shapes import share
from lmfusion.reports.pictures import captioned_grid, save_picture
from lmfusion.synthetic.shape_reader import read_scene
from lmfusion.synthetic.shapes import EDITS, Scene, SceneEdit, ShapeEdits, render
from lmfusion.utils.config_values import check_least, to_values

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion


@dataclass
class EditsConfig:
    """Which edits to make, and how. Raises ValueError for an unknown sampler and for numbers out of range."""

    num_per_kind: int = 32
    """Edits of each kind: the first ones of the test split, whose scenes are in no training split."""
    guidance_scale: float = 2.0
    """How closely to follow the instruction."""
    image_guidance_scale: float | None = 1.0
    """How closely to follow the input image; null: it is dropped together with the instruction."""
    sampler: str = "dpm-solver"
    num_steps: int = 25
    seed: int = 0
    batch_size: int = 32
    """Images generated at a time; changes speed and memory only."""
    num_shown: int = 10
    """Number of edits of each kind on the page."""

    def __post_init__(self) -> None:
        check_least(self, "edits", num_per_kind=1, batch_size=1, num_shown=0)
        image_options(self, "edits")
        held_out_edits(self.num_per_kind)


class EditScore(NamedTuple):
    """Whether an edit was made, and made right."""

    is_right: bool
    """The change was made, and nothing else changed."""
    is_made: bool
    """The change was made, whatever else changed."""
    is_kept: bool
    """Everything that the instruction does not change is still there, whatever was added."""
    is_copy: bool
    """The result shows the same as the input image."""


def score_edit(edit: SceneEdit, result: Scene) -> EditScore:
    """The score of `edit` for the scene that was read from its result."""
    source, before, after = edit.source.shapes, edit.before, edit.after
    others = [shape for shape in source if shape != before]
    occupied = {shape.cell for shape in source}
    if after is None:
        assert before is not None
        is_made = before.cell not in {shape.cell for shape in result.shapes}
        is_right = result == edit.target
    elif before is None:
        added = [shape for shape in result.shapes if shape[:3] == after[:3] and shape.cell not in occupied]
        is_made = len(added) > 0
        is_right = any(result == Scene.of([*source, shape]) for shape in added)
    else:
        is_made = after in result.shapes and before not in result.shapes
        is_right = result == edit.target
    is_kept = all(shape in result.shapes for shape in others)
    return EditScore(is_right, is_made, is_kept, result == edit.source)


@dataclass(frozen=True)
class EditsSuite:
    """Held-out edits of images of coloured shapes, checked exactly."""

    config_type: ClassVar[type] = EditsConfig
    config: EditsConfig

    def check(self) -> None:
        """Does nothing: the suite needs neither files nor optional packages."""

    def run(self, model: "LMFusion", folder: Path) -> SuiteResult:
        """Make held-out edits of every kind and score them. Writes edits.png into `folder`.

        Scores are shares of right edits: one per kind, "edits" over all of them, and the share "edits: did nothing".
        Raises ValueError if the model's images are smaller than 16 pixels.
        """
        config = self.config
        edits = held_out_edits(config.num_per_kind)
        images = generate_edits(model, edits, config)
        edit_scores = [score_edit(edit, read_scene(image)) for edit, image in zip(edits, images, strict=True)]
        scores, rows = [], []
        for kind in (*EDITS, None):
            of_kind = [score for edit, score in zip(edits, edit_scores, strict=True) if kind in (edit.kind, None)]
            example = next(edit.instruction for edit in edits if edit.kind == kind) if kind is not None else ""
            scores.append(share("edits" if kind is None else f"edits: {kind}", [v.is_right for v in of_kind]))
            made, kept, copied = (f"{x:.2f}" for x in np.mean([v[1:] for v in of_kind], axis=0))
            rows.append((kind or "together", example, str(scores[-1]), made, kept, copied, str(len(of_kind))))
        scores.append(share("edits: did nothing", [score.is_copy for score in edit_scores]))
        columns = ("edit", "such as", "right", "change made", "rest kept", "did nothing", "edits")
        pictures = _pictures(edits, images, edit_scores, config, folder)
        table = Table("Held-out edits, shares", columns, tuple(rows))
        return SuiteResult("edits", tuple(scores), to_values(config), tables=(table,), pictures=pictures)


@cache
def held_out_edits(num_per_kind: int) -> tuple[SceneEdit, ...]:
    """The first edits of each kind in the test split. Raises ValueError if there are fewer."""
    source = ShapeEdits(image_size=16, split="test")
    chosen: dict[str, list[SceneEdit]] = {kind: [] for kind in EDITS}
    for index in range(len(source)):
        edit = source.example(index)
        if len(chosen[edit.kind]) < num_per_kind:
            chosen[edit.kind].append(edit)
        if all(len(of_kind) == num_per_kind for of_kind in chosen.values()):
            break
    for kind, of_kind in chosen.items():
        if len(of_kind) < num_per_kind:
            raise ValueError(
                f"edits.num_per_kind must be at most {len(of_kind)}, the edits of kind {kind!r} in the test split, got "
                f"{num_per_kind}"
            )
    return tuple(edit for of_kind in chosen.values() for edit in of_kind)


def generate_edits(model: "LMFusion", edits: Sequence[SceneEdit], config: EditsConfig) -> list[Image.Image]:
    """The result of `model` for each input image and instruction."""
    image_size = model.codec.config.image_size
    prompts: list[list[str | Image.Image]] = [[edit.instruction, render(edit.source, image_size)] for edit in edits]
    return model.draw(prompts, batch_size=config.batch_size, **sampling_options(config))


def _pictures(
    edits: Sequence[SceneEdit],
    images: Sequence[Image.Image],
    edit_scores: Sequence[EditScore],
    config: EditsConfig,
    folder: Path,
) -> tuple[SampleImage, ...]:
    done = list(zip(edits, images, edit_scores, strict=True))
    shown = [
        ((render(edit.source, image.width), image), edit.instruction, score.is_right)
        for kind in EDITS
        for edit, image, score in [item for item in done if item[0].kind == kind][: config.num_shown]
    ]
    if not shown:
        return ()
    grid = captioned_grid(shown, min(config.num_shown, config.num_per_kind))
    save_picture(grid, folder / "edits.png")
    return (SampleImage("edits.png", "Held-out edits, a row per kind: the input image and the result; green: right"),)
