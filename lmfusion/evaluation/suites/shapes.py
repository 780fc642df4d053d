"""The suite `shapes`: whether generated images show their held-out captions of coloured shapes, checked exactly.

It follows GenEval (Ghosh et al. 2023; https://github.com/djghosh13/geneval), which does the same for photographs with
an object detector: its skills go from a single object over colours and counting to relations. Here
`lmfusion.synthetic.shape_reader` reads the shapes from the pixels, so no network takes part. An image is right if it
shows everything that its caption says and nothing else. Scores are shares of right images.
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
from lmfusion.evaluation.suites.image_settings import image_options, sampling_options
from lmfusion.reports.pictures import captioned_grid, save_picture
from lmfusion.synthetic.shape_reader import UNKNOWN, check, read_scene
from lmfusion.synthetic.shapes import SKILLS, CaptionedScene, Scene, Shapes, render
from lmfusion.utils.config_values import check_least, to_values

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion


@dataclass
class ShapesConfig:
    """Which captions, and how to generate. Raises ValueError for an unknown sampler and for numbers out of range."""

    num_per_skill: int = 32
    """Captions of each skill: the first ones of the test split, which are in no training split."""
    guidance_scale: float = 2.0
    sampler: str = "dpm-solver"
    num_steps: int = 25
    seed: int = 0
    batch_size: int = 32
    """Images generated at a time; changes speed and memory only."""
    num_shown: int = 10
    """Number of images of each skill on the page."""

    def __post_init__(self) -> None:
        check_least(self, "shapes", num_per_skill=1, batch_size=1, num_shown=0)
        image_options(self, "shapes")
        held_out_captions(self.num_per_skill)


class CheckedImage(NamedTuple):
    """A generated image and the scene that was read from it."""

    example: CaptionedScene
    image: Image.Image
    scene: Scene
    is_right: bool


@dataclass(frozen=True)
class ShapesSuite:
    """Images of held-out captions of coloured shapes, checked exactly."""

    config_type: ClassVar[type] = ShapesConfig
    config: ShapesConfig

    def check(self) -> None:
        """Does nothing: the suite needs neither files nor optional packages."""

    def run(self, model: "LMFusion", folder: Path) -> SuiteResult:
        """Generate images of held-out captions of every skill and check them. Writes shapes.png into `folder`.

        Scores are shares of right images: one per skill, and "shapes" over all of them. Raises ValueError if the
        model's images are smaller than 16 pixels.
        """
        config = self.config
        # Raises for images that are too small, before any is generated
        render(Scene(()), model.codec.config.image_size)
        checked = check_captions(model, held_out_captions(config.num_per_skill), config)
        scores, rows = [], []
        for skill in (*SKILLS, None):
            of_skill = [item for item in checked if skill in (item.example.skill, None)]
            name = "shapes" if skill is None else f"shapes: {skill}"
            scores.append(share(name, [item.is_right for item in of_skill]))
            readable = np.mean([_is_clean(item.scene) for item in of_skill])
            counted = np.mean([len(item.scene.shapes) == len(item.example.scene.shapes) for item in of_skill])
            example = str(of_skill[0].example.description) if skill is not None else ""
            rows.append(
                (skill or "together", example, str(scores[-1]), f"{counted:.2f}", f"{readable:.2f}", str(len(of_skill)))
            )
        columns = ("skill", "such as", "right", "right number of things", "only clean shapes", "images")
        pictures = _pictures(checked, config, folder)
        table = Table("Held-out captions, shares of images", columns, tuple(rows))
        return SuiteResult("shapes", tuple(scores), to_values(config), tables=(table,), pictures=pictures)


def _is_clean(scene: Scene) -> bool:
    """Whether there is at least one shape, and no thing that is not a shape."""
    return len(scene.shapes) > 0 and all(UNKNOWN not in shape for shape in scene.shapes)


@cache
def held_out_captions(num_per_skill: int) -> tuple[CaptionedScene, ...]:
    """The first captions of each skill in the test split. Raises ValueError if there are fewer."""
    source = Shapes(image_size=16, split="test")
    examples = [source.example(i) for i in range(len(source))]
    chosen: list[CaptionedScene] = []
    for skill in SKILLS:
        of_skill = [example for example in examples if example.skill == skill]
        if len(of_skill) < num_per_skill:
            raise ValueError(
                f"shapes.num_per_skill must be at most {len(of_skill)}, the captions of skill {skill!r} in the test "
                f"split, got {num_per_skill}"
            )
        chosen += of_skill[:num_per_skill]
    return tuple(chosen)


def check_captions(model: "LMFusion", examples: Sequence[CaptionedScene], config: ShapesConfig) -> list[CheckedImage]:
    """Generate an image for each caption, read it and check it."""
    prompts = [str(example.description) for example in examples]
    images = model.draw(prompts, batch_size=config.batch_size, **sampling_options(config))
    scenes = [read_scene(image) for image in images]
    is_right = [check(example.description, scene) for example, scene in zip(examples, scenes, strict=True)]
    return list(map(CheckedImage, examples, images, scenes, is_right))


def share(name: str, is_right: Sequence[bool]) -> Score:
    """The share of right ones, with its bootstrap interval."""
    values = np.array(is_right, np.float64)
    low, high = bootstrap(values)
    return Score(name, float(values.mean()), low, high, len(values))


def _pictures(checked: Sequence[CheckedImage], config: ShapesConfig, folder: Path) -> tuple[SampleImage, ...]:
    shown = [
        ((item.image,), str(item.example.description), item.is_right)
        for skill in SKILLS
        for item in [item for item in checked if item.example.skill == skill][: config.num_shown]
    ]
    if not shown:
        return ()
    grid = captioned_grid(shown, min(config.num_shown, config.num_per_skill))
    save_picture(grid, folder / "shapes.png")
    return (SampleImage("shapes.png", "Images of held-out captions, a row per skill; green: right"),)
