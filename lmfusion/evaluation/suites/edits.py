"""Does a model edit as it is told? Held-out instructions on coloured shapes, each result read and judged exactly.

An edit is right where the change was made and everything else is as it was: the same shapes, colours, sizes and cells.
A shape that is added may be in any free cell. As a model that copies its source keeps everything, the share that did
nothing stands beside the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from lmfusion.evaluation.results import SampleImage, SuiteResult, Table
from lmfusion.evaluation.suites.image_settings import drawing_values, image_options
from lmfusion.evaluation.suites.shapes import share
from lmfusion.reports.pictures import captioned_grid, save_picture
from lmfusion.synthetic.shape_reader import read_scene
from lmfusion.synthetic.shapes import EDITS, Scene, SceneEdit, ShapeEdits, render
from lmfusion.utils.config_values import check_least, to_values

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion


@dataclass
class EditsConfig:
    """What is edited. Raises ValueError for an unknown sampler and for numbers out of range."""

    num_per_kind: int = 32
    """Edits of each kind: the first ones of the test split, neither scene of which is ever trained on."""
    guidance_scale: float = 2.0
    """How closely to follow the instruction."""
    image_guidance_scale: float | None = 1.0
    """How closely to follow the source; null: it is dropped together with the instruction."""
    sampler: str = "dpm-solver"
    num_steps: int = 25
    seed: int = 0
    batch_size: int = 32
    """Drawn at a time; changes speed and memory only."""
    num_shown: int = 10
    """Edits of each kind on the page."""

    def __post_init__(self) -> None:
        check_least(self, "edits", num_per_kind=1, batch_size=1, num_shown=0)
        image_options(self, "edits")
        held_out_edits(self.num_per_kind)


class Verdict(NamedTuple):
    """What became of an edit."""

    is_right: bool
    """The change was made, and nothing else."""
    is_made: bool
    """The change was made, whatever else there is."""
    is_kept: bool
    """All that was not to be changed is as it was, whatever else there is."""
    is_nothing: bool
    """The picture still shows the source."""


def judge(edit: SceneEdit, seen: Scene) -> Verdict:
    """What became of `edit` where its result shows `seen`."""
    source, before, after = edit.source.shapes, edit.before, edit.after
    others = [shape for shape in source if shape != before]
    occupied = {shape.cell for shape in source}
    if after is None:
        assert before is not None
        is_made = before.cell not in {shape.cell for shape in seen.shapes}
        is_right = seen == edit.target
    elif before is None:
        added = [shape for shape in seen.shapes if shape[:3] == after[:3] and shape.cell not in occupied]
        is_made = len(added) > 0
        is_right = any(seen == Scene.of([*source, shape]) for shape in added)
    else:
        is_made = after in seen.shapes and before not in seen.shapes
        is_right = seen == edit.target
    is_kept = all(shape in seen.shapes for shape in others)
    return Verdict(is_right, is_made, is_kept, seen == edit.source)


@dataclass(frozen=True)
class EditsSuite:
    """Held-out edits of images of coloured shapes, checked exactly."""

    config_type: ClassVar[type] = EditsConfig
    config: EditsConfig

    def check(self) -> None:
        """Nothing to look for: the suite needs neither files nor optional packages."""

    def run(self, model: "LMFusion", folder: Path) -> SuiteResult:
        """Make held-out edits of every kind and judge them; writes edits.png into `folder`.

        Scores are shares of right edits: one a kind, and "edits" over all of them; and "edits: did nothing". Raises
        ValueError where the model's images are smaller than 16 pixels.
        """
        config = self.config
        edits = held_out_edits(config.num_per_kind)
        images = draw_edits(model, edits, config)
        verdicts = [judge(edit, read_scene(image)) for edit, image in zip(edits, images, strict=True)]
        scores, rows = [], []
        for kind in (*EDITS, None):
            of_kind = [verdict for edit, verdict in zip(edits, verdicts, strict=True) if kind in (edit.kind, None)]
            example = next(edit.instruction for edit in edits if edit.kind == kind) if kind is not None else ""
            scores.append(share("edits" if kind is None else f"edits: {kind}", [v.is_right for v in of_kind]))
            made, kept, nothing = (f"{x:.2f}" for x in np.mean([v[1:] for v in of_kind], axis=0))
            rows.append((kind or "together", example, str(scores[-1]), made, kept, nothing, str(len(of_kind))))
        scores.append(share("edits: did nothing", [verdict.is_nothing for verdict in verdicts]))
        columns = ("edit", "such as", "right", "change made", "rest kept", "did nothing", "edits")
        pictures = _pictures(edits, images, verdicts, config, folder)
        table = Table("Held-out edits, shares", columns, tuple(rows))
        return SuiteResult("edits", tuple(scores), to_values(config), tables=(table,), pictures=pictures)


@cache
def held_out_edits(num_per_kind: int) -> tuple[SceneEdit, ...]:
    """The first edits of each kind in the test split. Raises ValueError where there are fewer."""
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
            raise ValueError(f"edits.num_per_kind is {num_per_kind}; the test split has {len(of_kind)} of {kind!r}")
    return tuple(edit for of_kind in chosen.values() for edit in of_kind)


def draw_edits(model: "LMFusion", edits: Sequence[SceneEdit], config: EditsConfig) -> list[Image.Image]:
    """What `model` makes of each source and instruction."""
    image_size = model.codec.config.image_size
    prompts: list[list[str | Image.Image]] = [[edit.instruction, render(edit.source, image_size)] for edit in edits]
    return model.draw(prompts, batch_size=config.batch_size, **drawing_values(config))


def _pictures(
    edits: Sequence[SceneEdit],
    images: Sequence[Image.Image],
    verdicts: Sequence[Verdict],
    config: EditsConfig,
    folder: Path,
) -> tuple[SampleImage, ...]:
    done = list(zip(edits, images, verdicts, strict=True))
    shown = [
        ((render(edit.source, image.width), image), edit.instruction, verdict.is_right)
        for kind in EDITS
        for edit, image, verdict in [item for item in done if item[0].kind == kind][: config.num_shown]
    ]
    if not shown:
        return ()
    grid = captioned_grid(shown, min(config.num_shown, config.num_per_kind))
    save_picture(grid, folder / "edits.png")
    return (SampleImage("edits.png", "Held-out edits, a row a kind: the source and what came of it; green: right"),)
