"""Reads which coloured shapes an image shows, from its pixels.

Every pixel is compared with the lines from white to each colour, on which blurred edges lie. Connected pixels that are
not background are one region. A region is a shape if it fits a rendered shape (the kinds and sizes of `shapes`) laid
over its centre, lies within one cell and has one colour; otherwise that property is UNKNOWN, which is never right.
Regions of less than a third of the smallest shape are noise. If all noise together is larger than the smallest shape,
it counts as one unknown shape.
"""

from functools import cache

import numpy as np
from PIL import Image

from lmfusion.synthetic.shapes import BACKGROUND, COLOURS, GRID, KINDS, SIZES, Description, Scene, Shape, coverage

UNKNOWN = "unknown"
"""Kind, colour or size of a region that does not fit any."""
MIN_OVERLAP = 0.72
"""Intersection over union that a region must have with its shape."""
MAX_OFFSET = 0.2
"""Distance of a shape from the middle of its cell, in cells."""
MAX_COLOUR_DISTANCE = 80.0
"""Distance from the line of a colour, in units of RGB (0 to 255)."""
MIN_OF_ONE_COLOUR = 0.8
"""Share of a region that must have its colour."""
_SPECK = 1 / 3
_MIN_COVERED = 0.4
"""A pixel that is covered less is background."""


def read_scene(image: Image.Image) -> Scene:
    """The shapes in a square image, in order of their cells. Raises ValueError for an image that is not square.

    Regions that are not shapes are among them, with UNKNOWN for what does not fit.
    """
    if image.width != image.height:
        raise ValueError(f"the image of a scene must be square, got {image.width} x {image.height} pixels")
    pixels = np.asarray(image.convert("RGB"), np.float64)
    covered, colour_index = _nearest_colours(pixels)
    smallest = min(template.sum() for template in _templates(image.width).values())
    shapes: list[Shape] = []
    specks = np.zeros(pixels.shape[:2], bool)
    for region in _regions(covered > _MIN_COVERED):
        if (covered * region).sum() < _SPECK * smallest:
            specks |= region
        else:
            shapes.append(_read_region(region, covered, colour_index))
    if (covered * specks).sum() > smallest:
        row, column = (int(x.mean()) * GRID // image.width for x in np.nonzero(specks))
        shapes.append(Shape(UNKNOWN, UNKNOWN, UNKNOWN, row, column))
    return Scene.of(shapes)


def check(expected: Scene | Description, image: Image.Image | Scene) -> bool:
    """Whether an image, or the scene that was read from it, shows what is expected and nothing else.

    A scene must match with every shape in its cell. A description must match in what it says: the number of shapes,
    their properties and their relation.
    """
    found = image if isinstance(image, Scene) else read_scene(image)
    return found == expected if isinstance(expected, Scene) else expected.fits(found)


def _nearest_colours(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel is covered (float64 [H, W], 0 to 1), and the number of its nearest colour (-1: none)."""
    white = np.array(BACKGROUND, np.float64)
    colours = np.array(list(COLOURS.values()), np.float64) - white  # [n, 3]
    away = pixels - white
    share = np.clip(away @ colours.T / (colours**2).sum(axis=1), 0, 1)  # [H, W, n]
    distance = np.linalg.norm(away[:, :, None] - share[..., None] * colours, axis=-1)
    nearest = distance.argmin(axis=-1)
    covered = np.take_along_axis(share, nearest[..., None], axis=-1)[..., 0]
    is_known = distance.min(axis=-1) <= MAX_COLOUR_DISTANCE
    # A pixel that is far from every colour is covered by something, too
    return np.where(is_known, covered, np.clip(np.linalg.norm(away, axis=-1) / 255, 0, 1)), np.where(
        is_known, nearest, -1
    )


def _regions(is_covered: np.ndarray) -> list[np.ndarray]:
    """bool [H, W] of each connected region. Pixels are connected if they share an edge."""
    left = is_covered.copy()
    height, width = left.shape
    regions = []
    while left.any():
        region = np.zeros_like(left)
        ahead = [divmod(int(left.argmax()), width)]
        while ahead:
            y, x = ahead.pop()
            if 0 <= y < height and 0 <= x < width and left[y, x]:
                left[y, x], region[y, x] = False, True
                ahead += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        regions.append(region)
    return regions


def _read_region(region: np.ndarray, covered: np.ndarray, colour_index: np.ndarray) -> Shape:
    """The shape of a region, with UNKNOWN for what does not fit."""
    image_size = len(region)
    y, x = np.nonzero(region)
    top, bottom, left, right = max(0, y.min() - 1), y.max() + 2, max(0, x.min() - 1), x.max() + 2
    near = np.zeros_like(covered)
    near[top:bottom, left:right] = covered[top:bottom, left:right]  # including the faint pixels at its edge
    middle = _middle(near)
    row, column = (min(GRID - 1, int(place * GRID / image_size)) for place in middle)
    overlaps = {key: _overlap(near, _moved_to(template, middle)) for key, template in _templates(image_size).items()}
    kind, size = max(overlaps, key=lambda key: overlaps[key])
    own = (_middle(coverage(kind, size, row, column, image_size)) - middle) * GRID / image_size
    if overlaps[kind, size] < MIN_OVERLAP or abs(own).max() > MAX_OFFSET:
        kind = size = UNKNOWN
    votes = np.bincount(colour_index[region] + 1, weights=covered[region], minlength=len(COLOURS) + 1)
    best = int(votes.argmax())
    is_one = best > 0 and votes[best] >= MIN_OF_ONE_COLOUR * votes.sum()
    return Shape(kind, list(COLOURS)[best - 1] if is_one else UNKNOWN, size, row, column)


@cache
def _templates(image_size: int) -> dict[tuple[str, str], np.ndarray]:
    """How each kind and size covers the pixels of the first cell."""
    return {(kind, size): coverage(kind, size, 0, 0, image_size) for kind in KINDS for size in SIZES}


def _middle(covered: np.ndarray) -> np.ndarray:
    """float64 [2]: centre of mass, (y, x) in pixels from the corner."""
    places = np.arange(len(covered)) + 0.5
    return np.array([covered.sum(axis=1) @ places, covered.sum(axis=0) @ places]) / covered.sum()


def _moved_to(template: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """`template` with its centre of mass at `middle`, between pixels by linear interpolation."""
    for axis, step in enumerate(middle - _middle(template)):
        whole = int(np.floor(step))
        part = step - whole
        template = (1 - part) * np.roll(template, whole, axis) + part * np.roll(template, whole + 1, axis)
    return template


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())
