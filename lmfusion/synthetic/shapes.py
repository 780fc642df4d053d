"""The sources `shapes` and `shape_edits`: rendered coloured shapes whose images can be checked exactly.

A scene has one to four shapes on white, each in its own cell of a grid of 2 x 2. Captions name some of what is there:

    a circle                                              single
    a red circle                                          colour
    a small red circle                                    size
    three red circles                                     count
    a blue square left of a green triangle                relation
    a small blue square above a large green triangle      all

and instructions change one thing: "make the circle blue", "move the red square to the top", "remove the green
triangle", "add a small yellow circle". Sample i of a split is a pure function of the split and i.

A scene is held out because of its contents (`is_held_out`), whatever the sizes and places of its shapes: if "three red
circles" are held out, no training sample of either source shows or names them.
"""

import hashlib
from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from lmfusion.data.config import SPLITS
from lmfusion.data.samples import CaptionedImage, Edit
from lmfusion.data.sources.base import SingleBlock
from lmfusion.utils.randomness import generator

KINDS = ("circle", "square", "triangle")
COLOURS = {
    "red": (230, 30, 40),
    "green": (30, 160, 60),
    "blue": (40, 70, 230),
    "yellow": (245, 205, 30),
    "purple": (160, 50, 200),
    "black": (20, 20, 20),
}
"""RGB. No two colours lie in the same direction from white, so that blurred edges keep their colour."""
BACKGROUND = (255, 255, 255)
SIZES = {"small": 0.24, "large": 0.42}
"""Half the width of a shape, in cells."""
GRID = 2
"""Cells on each side."""
MAX_SHAPES = GRID * GRID
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
"""(row, column) of the first shape minus that of the second."""
SIDES = {"left": (1, 0), "right": (1, GRID - 1), "top": (0, 0), "bottom": (0, GRID - 1)}
"""Side to move to -> the coordinate that changes (0: row), and its new value."""
SKILLS = ("single", "colour", "size", "count", "relation", "all")
EDITS = ("recolour", "move", "remove", "add")
NUM_SAMPLES = {"train": 20_000, "test": 1_000}

_NUMBERS = ("no", "one", "two", "three", "four")
_SKILL_SHARES = (0.06, 0.1, 0.12, 0.24, 0.24, 0.24)
_HELD_OUT = 8
"""One in this number of scenes with different shapes is held out."""
_SUBSAMPLES = 8
"""Sample points on each side of a pixel, to find how much of it is covered."""


class Shape(NamedTuple):
    """One shape of a scene."""

    kind: str
    """One of KINDS."""
    colour: str
    size: str
    row: int
    """Of its cell, from the top."""
    column: int

    @property
    def cell(self) -> tuple[int, int]:
        return self.row, self.column


class Scene(NamedTuple):
    """The contents of an image: its shapes in order of their cells, row by row."""

    shapes: tuple[Shape, ...]

    @classmethod
    def of(cls, shapes: Sequence[Shape]) -> "Scene":
        return cls(tuple(sorted(shapes, key=lambda shape: shape.cell)))


class Thing(NamedTuple):
    """What a caption says about one shape, or about several equal ones. None: it does not say."""

    kind: str
    colour: str | None = None
    size: str | None = None
    number: int = 1

    def fits(self, shape: Shape) -> bool:
        return shape.kind == self.kind and self.colour in (None, shape.colour) and self.size in (None, shape.size)

    def __str__(self) -> str:
        article = "a" if self.number == 1 else _NUMBERS[self.number]
        words = (article, self.size, self.colour, self.kind + "s" * (self.number > 1))
        return " ".join(word for word in words if word is not None)


class Description(NamedTuple):
    """What a caption says about a scene: one thing, or two and the relation of the first to the second."""

    things: tuple[Thing, ...]
    relation: str | None = None

    def fits(self, scene: Scene) -> bool:
        """Whether the scene shows this and nothing else."""
        shapes = scene.shapes
        if self.relation is None:
            [thing] = self.things
            return len(shapes) == thing.number and all(map(thing.fits, shapes))
        if len(shapes) != 2:
            return False
        return any(
            (first.row - second.row, first.column - second.column) == RELATIONS[self.relation]
            and all(thing.fits(shape) for thing, shape in zip(self.things, (first, second), strict=True))
            for first, second in (shapes, shapes[::-1])
        )

    def __str__(self) -> str:
        return f" {self.relation} ".join(map(str, self.things))


class CaptionedScene(NamedTuple):
    """A sample of `Shapes` before it is rendered."""

    skill: str
    """The skill that its caption tests: one of SKILLS."""
    scene: Scene
    description: Description


class SceneEdit(NamedTuple):
    """A sample of `ShapeEdits` before it is rendered."""

    kind: str
    """One of EDITS."""
    source: Scene
    instruction: str
    target: Scene
    before: Shape | None
    """The shape that is changed; None where one is added."""
    after: Shape | None
    """What it becomes; None where it is removed."""


def caption(scene: Scene) -> str:
    """The most detailed caption of a scene with one shape, with equal shapes, or with two side by side.

    Raises ValueError for other scenes, which have no caption.
    """
    return str(describe(scene))


def describe(scene: Scene) -> Description:
    """The contents of `caption`. Raises ValueError for a scene that has no caption."""
    alike = {shape[:3] for shape in scene.shapes}
    if len(alike) == 1:
        kind, colour, size = alike.pop()
        return Description((Thing(kind, colour, size, len(scene.shapes)),))
    if len(scene.shapes) == 2:
        first, second = scene.shapes
        difference = (first.row - second.row, first.column - second.column)
        for relation, offset in RELATIONS.items():
            if difference == offset:
                return Description((Thing(*first[:3]), Thing(*second[:3])), relation)
    raise ValueError(
        f"a scene with a caption must have one shape, several equal ones, or two side by side, got {len(scene.shapes)} "
        "others"
    )


def is_held_out(scene: Scene) -> bool:
    """Whether a scene belongs to the test split. It depends on kinds, colours, and the number or relative places.

    Of scenes with equal shapes, each number of each kind is held out in one colour; of the others, one scene in eight.
    """
    if len({(shape.kind, shape.colour) for shape in scene.shapes}) == 1:
        kind, colour = scene.shapes[0][:2]
        return (tuple(COLOURS).index(colour) - 2 * KINDS.index(kind) - len(scene.shapes)) % len(COLOURS) == 0
    top, left = (min(shape.cell[axis] for shape in scene.shapes) for axis in (0, 1))
    content = ", ".join(f"{s.colour} {s.kind} at {s.row - top} {s.column - left}" for s in scene.shapes)
    return hashlib.blake2b(content.encode(), digest_size=1).digest()[0] % _HELD_OUT == 0


def render(scene: Scene, image_size: int) -> Image.Image:
    """The image of a scene, RGB, with smooth edges. Raises ValueError below 16 pixels."""
    if image_size < 16:
        raise ValueError(f"image_size must be at least 16 pixels to distinguish shapes, got {image_size}")
    picture = np.full((image_size, image_size, 3), BACKGROUND, np.float64)
    for shape in scene.shapes:
        covered = coverage(shape.kind, shape.size, shape.row, shape.column, image_size)[..., None]
        picture += covered * (np.array(COLOURS[shape.colour], np.float64) - picture)
    return Image.fromarray(picture.round().astype(np.uint8))


@cache
def coverage(kind: str, size: str, row: int, column: int, image_size: int) -> np.ndarray:
    """float64 [image_size, image_size]: how much of each pixel a shape in that cell covers, 0 to 1."""
    num_points = image_size * _SUBSAMPLES
    points = (np.arange(num_points) + 0.5) / num_points * GRID  # in cells
    x, y = points[None, :] - (column + 0.5), points[:, None] - (row + 0.5)
    radius = SIZES[size]
    if kind == "circle":
        inside = x**2 + y**2 <= radius**2
    elif kind == "square":
        inside = (abs(x) <= radius) & (abs(y) <= radius)
    else:  # a point at the top, and a base as wide as the square
        inside = (abs(y) <= radius) & (abs(x) <= (y + radius) / 2)
    fine = inside.reshape(image_size, _SUBSAMPLES, image_size, _SUBSAMPLES)
    return fine.mean(axis=(1, 3))


class _ShapeSource(SingleBlock):
    """Common to both sources: the samples of a split, rendered when they are loaded, `image_size` pixels square."""

    def __init__(self, image_size: int, split: str = "train") -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        self._image_size = image_size
        self._split = split

    def __len__(self) -> int:
        return NUM_SAMPLES[self._split]


class Shapes(_ShapeSource):
    """The source `shapes`: captioned scenes."""

    def example(self, index: int) -> CaptionedScene:
        """Sample `index` before it is rendered."""
        _check_index(index, len(self))
        rng = generator(0, 0, f"shapes/{self._split}/{index}", "scene")
        skill = SKILLS[int(rng.choice(len(SKILLS), p=_SKILL_SHARES))]
        while True:
            scene = _pair(rng) if skill in ("relation", "all") else _alike(rng, skill == "count")
            if is_held_out(scene) == (self._split == "test"):
                return CaptionedScene(skill, scene, _worded(rng, skill, scene))

    def __getitem__(self, index: int) -> CaptionedImage:
        _, scene, description = self.example(index)
        sample_id = f"shapes/{self._split}/{index}"
        return CaptionedImage(sample_id, partial(render, scene, self._image_size), (str(description),))


class ShapeEdits(_ShapeSource):
    """The source `shape_edits`: scenes of one to three different shapes, instructions, and the edited scenes."""

    def example(self, index: int) -> SceneEdit:
        """Sample `index` before it is rendered."""
        _check_index(index, len(self))
        rng = generator(0, 0, f"shape_edits/{self._split}/{index}", "edit")
        kind = EDITS[int(rng.integers(len(EDITS)))]
        while True:
            edit = _edit(rng, kind)
            if edit is not None and all(
                is_held_out(scene) == (self._split == "test") for scene in (edit.source, edit.target)
            ):
                return edit

    def __getitem__(self, index: int) -> Edit:
        edit = self.example(index)
        return Edit(
            f"shape_edits/{self._split}/{index}",
            partial(render, edit.source, self._image_size),
            edit.instruction,
            partial(render, edit.target, self._image_size),
        )


def _check_index(index: int, size: int) -> None:
    if not 0 <= index < size:
        raise IndexError(f"the index of a sample must be in [0, {size}), got {index}")


def _pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _cells(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """Different cells in random order."""
    return [divmod(int(place), GRID) for place in rng.permutation(MAX_SHAPES)[:count]]


def _kind_colour_size(rng: np.random.Generator) -> tuple[str, str, str]:
    return _pick(rng, KINDS), _pick(rng, tuple(COLOURS)), _pick(rng, tuple(SIZES))


def _alike(rng: np.random.Generator, is_several: bool) -> Scene:
    """One shape, or two to four equal ones."""
    count = int(rng.integers(2, MAX_SHAPES + 1)) if is_several else 1
    appearance = _kind_colour_size(rng)
    return Scene.of([Shape(*appearance, *cell) for cell in _cells(rng, count)])


def _pair(rng: np.random.Generator) -> Scene:
    """Two shapes side by side, of different kind or colour."""
    row, column = divmod(int(rng.integers(MAX_SHAPES)), GRID)
    other = (1 - row, column) if rng.random() < 0.5 else (row, 1 - column)
    first = second = _kind_colour_size(rng)
    while second[:2] == first[:2]:
        second = _kind_colour_size(rng)
    return Scene.of([Shape(*first, row, column), Shape(*second, *other)])


def _worded(rng: np.random.Generator, skill: str, scene: Scene) -> Description:
    """What a caption for `skill` says about the scene. Either of two shapes may come first."""
    things, relation = describe(scene)
    if relation is not None and rng.random() < 0.5:
        back = tuple(-step for step in RELATIONS[relation])
        things, relation = things[::-1], next(name for name, offset in RELATIONS.items() if offset == back)
    if skill == "single":
        things = tuple(Thing(thing.kind) for thing in things)
    elif skill not in ("size", "all"):
        things = tuple(thing._replace(size=None) for thing in things)
    return Description(things, relation)


def _edit(rng: np.random.Generator, kind: str) -> SceneEdit | None:
    """An edit of a random scene; None if that scene has no such edit."""
    num_shapes = int(rng.integers(1, 3) if kind == "add" else rng.integers(2, 4))
    *cells, free = _cells(rng, num_shapes + 1)
    shapes, new = [Shape(*_kind_colour_size(rng), *cell) for cell in cells], Shape(*_kind_colour_size(rng), *free)
    if len({shape[:2] for shape in [*shapes, new]}) <= len(shapes):  # kind and colour must identify every shape
        return None
    if kind == "add":
        instruction = f"add {Thing(*new[:3])}"
        return SceneEdit(kind, Scene.of(shapes), instruction, Scene.of([*shapes, new]), None, new)
    before, *others = shapes
    after: Shape | None = None
    name = _name(rng, before, others)
    if kind == "remove":
        instruction = f"remove {name}"
    elif kind == "recolour":
        after = before._replace(colour=new.colour)
        instruction = f"make {name} {new.colour}"
        if new.colour == before.colour or after[:2] in {shape[:2] for shape in others}:
            return None
    else:
        side = _pick(rng, tuple(SIDES))
        axis, place = SIDES[side]
        after = before._replace(row=place) if axis == 0 else before._replace(column=place)
        instruction = f"move {name} to the {side}"
        if after.cell in {shape.cell for shape in shapes}:
            return None
    target = Scene.of(others if after is None else [*others, after])
    return SceneEdit(kind, Scene.of(shapes), instruction, target, before, after)


def _name(rng: np.random.Generator, shape: Shape, others: Sequence[Shape]) -> str:
    """Words that mean only this shape: "the circle", or "the red circle"."""
    is_only_one = all(other.kind != shape.kind for other in others)
    return f"the {shape.kind}" if is_only_one and rng.random() < 0.5 else f"the {shape.colour} {shape.kind}"
