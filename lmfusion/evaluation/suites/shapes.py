"""Does a model draw what a caption says? Held-out captions of coloured shapes, each drawing read and judged exactly.

After GenEval (Ghosh et al. 2023), which asks the same of photographs, with a detector in the checker's place: skills
from a single object over colours and counting to relations, a drawing being right where everything that its caption
says is there, and nothing else. Scores are shares of right drawings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from lmfusion.evaluation.metrics.bootstrap import bootstrap
from lmfusion.evaluation.results import SampleImage, Score, SuiteResult, Table
from lmfusion.evaluation.suites.image_settings import drawing_values, image_options
from lmfusion.reports.pictures import captioned_grid, save_picture
from lmfusion.synthetic.shape_reader import UNKNOWN, check, read_scene
from lmfusion.synthetic.shapes import SKILLS, CaptionedScene, Scene, Shapes, render
from lmfusion.utils.config_values import check_least, to_values

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion


@dataclass
class ShapesConfig:
    """What is drawn. Raises ValueError for an unknown sampler and for numbers out of range."""

    num_per_skill: int = 32
    """Captions of each skill: the first ones of the test split, which are never trained on."""
    guidance_scale: float = 2.0
    sampler: str = "dpm-solver"
    num_steps: int = 25
    seed: int = 0
    batch_size: int = 32
    """Drawn at a time; changes speed and memory only."""
    num_shown: int = 10
    """Drawings of each skill on the page."""

    def __post_init__(self) -> None:
        check_least(self, "shapes", num_per_skill=1, batch_size=1, num_shown=0)
        image_options(self, "shapes")
        held_out_captions(self.num_per_skill)


class Judged(NamedTuple):
    """A drawing and what was found in it."""

    asked: CaptionedScene
    image: Image.Image
    seen: Scene
    is_right: bool


@dataclass(frozen=True)
class ShapesSuite:
    """Images of held-out captions of coloured shapes, checked exactly."""

    config_type: ClassVar[type] = ShapesConfig
    config: ShapesConfig

    def check(self) -> None:
        """Nothing to look for: the suite needs neither files nor optional packages."""

    def run(self, model: "LMFusion", folder: Path) -> SuiteResult:
        """Draw held-out captions of every skill and judge them; writes shapes.png into `folder`.

        Scores are shares of right drawings: one a skill, and "shapes" over all of them. Raises ValueError where the model's
        images are smaller than 16 pixels.
        """
        config = self.config
        render(Scene(()), model.codec.config.image_size)  # complain of too small images before any is drawn
        judged = draw_captions(model, held_out_captions(config.num_per_skill), config)
        scores, rows = [], []
        for skill in (*SKILLS, None):
            of_skill = [item for item in judged if skill in (item.asked.skill, None)]
            name = "shapes" if skill is None else f"shapes: {skill}"
            scores.append(share(name, [item.is_right for item in of_skill]))
            readable = np.mean([_is_clean(item.seen) for item in of_skill])
            counted = np.mean([len(item.seen.shapes) == len(item.asked.scene.shapes) for item in of_skill])
            example = str(of_skill[0].asked.description) if skill is not None else ""
            rows.append(
                (skill or "together", example, str(scores[-1]), f"{counted:.2f}", f"{readable:.2f}", str(len(of_skill)))
            )
        columns = ("skill", "such as", "right", "right number of things", "only clean shapes", "drawings")
        pictures = _pictures(judged, config, folder)
        table = Table("Held-out captions, shares of drawings", columns, tuple(rows))
        return SuiteResult("shapes", tuple(scores), to_values(config), tables=(table,), pictures=pictures)


def _is_clean(scene: Scene) -> bool:
    """Whether there is something, and nothing of it is a blot."""
    return len(scene.shapes) > 0 and all(UNKNOWN not in shape for shape in scene.shapes)


@cache
def held_out_captions(num_per_skill: int) -> tuple[CaptionedScene, ...]:
    """The first captions of each skill in the test split. Raises ValueError where there are fewer."""
    source = Shapes(image_size=16, split="test")
    examples = [source.example(i) for i in range(len(source))]
    chosen: list[CaptionedScene] = []
    for skill in SKILLS:
        of_skill = [example for example in examples if example.skill == skill]
        if len(of_skill) < num_per_skill:
            raise ValueError(
                f"shapes.num_per_skill is {num_per_skill}; the test split has {len(of_skill)} of skill {skill!r}"
            )
        chosen += of_skill[:num_per_skill]
    return tuple(chosen)


def draw_captions(model: "LMFusion", asked: Sequence[CaptionedScene], config: ShapesConfig) -> list[Judged]:
    """A drawing of each caption, read and judged."""
    prompts = [str(example.description) for example in asked]
    images = model.draw(prompts, batch_size=config.batch_size, **drawing_values(config))
    seen = [read_scene(image) for image in images]
    is_right = [check(example.description, scene) for example, scene in zip(asked, seen, strict=True)]
    return list(map(Judged, asked, images, seen, is_right))


def share(name: str, is_right: Sequence[bool]) -> Score:
    """The share of what is right, with its interval."""
    values = np.array(is_right, np.float64)
    low, high = bootstrap(values)
    return Score(name, float(values.mean()), low, high, len(values))


def _pictures(judged: Sequence[Judged], config: ShapesConfig, folder: Path) -> tuple[SampleImage, ...]:
    shown = [
        ((item.image,), str(item.asked.description), item.is_right)
        for skill in SKILLS
        for item in [item for item in judged if item.asked.skill == skill][: config.num_shown]
    ]
    if not shown:
        return ()
    grid = captioned_grid(shown, min(config.num_shown, config.num_per_skill))
    save_picture(grid, folder / "shapes.png")
    return (SampleImage("shapes.png", "Drawings of held-out captions, a row a skill; green: right"),)
