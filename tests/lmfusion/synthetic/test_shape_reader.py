"""The checker: all that is drawn is read as it is, moderate noise or not, and whatever is wrong is never right."""

from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lmfusion.evaluation.suites.edits import score_edit
from lmfusion.synthetic.shape_reader import UNKNOWN, check, read_scene
from lmfusion.synthetic.shapes import COLOURS, KINDS, SIZES, Scene, Shape, ShapeEdits, Shapes, describe, render

RED = Shape("circle", "red", "large", 0, 0)
BLUE = Shape("square", "blue", "small", 0, 1)


@cache
def scenes(split, num):
    return [Shapes(32, split).example(i) for i in range(num)]


def with_noise(image, sigma, seed=0):
    pixels = np.asarray(image, np.float64)
    noisy = pixels + np.random.default_rng(seed).normal(0, sigma, pixels.shape)
    return Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))


@pytest.mark.parametrize(("image_size", "num"), [(24, 150), (32, 500), (64, 30)])
@pytest.mark.parametrize("split", ["train", "test"])
def test_what_is_drawn_is_read(split, image_size, num):
    for _, scene, description in scenes(split, num):
        image = render(scene, image_size)
        assert read_scene(image) == scene
        assert check(scene, image) and check(description, image)


def test_scenes_of_edits_are_read():
    for i in range(60):
        edit = ShapeEdits(32, "test").example(i)
        assert [read_scene(render(s, 32)) for s in (edit.source, edit.target)] == [edit.source, edit.target]


@pytest.mark.parametrize("sigma", [8, 16])
def test_noise_does_not_matter(sigma):
    for i, (_, scene, _) in enumerate(scenes("test", 100)):
        assert read_scene(with_noise(render(scene, 32), sigma, seed=i)) == scene


def test_specks_and_faint_colours_do_not_matter():
    image = render(Scene((RED, BLUE)), 32)
    image.putpixel((4, 28), COLOURS["black"])
    faded = Image.blend(image, Image.new("RGB", image.size, "white"), 0.1)
    assert read_scene(image) == read_scene(faded) == Scene((RED, BLUE))


@pytest.mark.parametrize(
    "wrong",
    [{"kind": kind} for kind in KINDS[1:]]
    + [{"colour": colour} for colour in COLOURS if colour != "red"]
    + [{"size": "small"}, {"row": 1}, {"row": 1, "column": 1}],
    ids=str,
)
def test_each_wrong_attribute_is_refused(wrong):
    scene = Scene((RED, BLUE))
    assert str(describe(scene)) == "a large red circle left of a small blue square"
    changed = render(Scene.of([RED._replace(**wrong), BLUE]), 32)
    assert not check(describe(scene), changed) and not check(scene, changed)


def test_wrong_numbers_are_refused():
    alike = [RED._replace(row=row, column=column) for row in (0, 1) for column in (0, 1)]
    wanted = describe(Scene.of(alike[:3]))
    assert str(wanted) == "three large red circles"
    for number in (1, 2, 4):
        assert not check(wanted, render(Scene.of(alike[:number]), 32))
    for others in ([*alike[:2], BLUE], [*alike[:3], BLUE._replace(row=1)]):
        assert not check(wanted, render(Scene.of(others), 32))
    assert check(wanted, render(Scene.of(alike[1:]), 32))
    assert not check(wanted, Image.new("RGB", (32, 32), "white"))


def test_what_is_left_open_may_be_anything():
    wanted = describe(Scene((RED,)))
    wanted = wanted._replace(things=(wanted.things[0]._replace(size=None, colour=None),))
    assert str(wanted) == "a circle"
    for size in SIZES:
        for colour in COLOURS:
            assert check(wanted, Scene((Shape("circle", colour, size, 1, 1),)))


def draw(*calls):
    image = render(Scene((BLUE,)), 32)
    pen = ImageDraw.Draw(image)
    for name, box, fill in calls:
        getattr(pen, name)(box, fill=fill)
    return image


@pytest.mark.parametrize(
    ("image", "unknown"),
    [
        (draw(("rectangle", (1, 24, 14, 26), COLOURS["red"])), {"kind", "size"}),  # a bar
        (draw(("rectangle", (10, 18, 21, 29), COLOURS["red"])), {"kind", "size"}),  # between two cells
        (draw(("rectangle", (2, 18, 13, 29), (0, 230, 230))), {"colour"}),
        (draw(("rectangle", (2, 18, 13, 23), COLOURS["red"]), ("rectangle", (2, 24, 13, 29), COLOURS["green"])),
         {"colour"}),
        (draw(*(("point", (x, y), COLOURS["red"]) for x in range(1, 14, 2) for y in range(17, 30, 2))),
         {"kind", "colour", "size"}),  # dust
    ],
    ids=["bar", "between", "cyan", "two-coloured", "dust"],
)  # fmt: skip
def test_what_is_no_shape_is_unknown(image, unknown):
    blue, thing = read_scene(image).shapes
    assert blue == BLUE
    assert {name for name, value in zip(Shape._fields, thing, strict=True) if value == UNKNOWN} == unknown
    assert not check(describe(Scene((BLUE,))), image)


def test_a_picture_that_is_not_square():
    with pytest.raises(ValueError, match="32 x 24 pixels"):
        read_scene(Image.new("RGB", (32, 24)))


# Edits


def test_an_edit_is_right_where_it_was_made_and_nothing_else():
    for i in range(80):
        edit = ShapeEdits(32, "test").example(i)
        assert score_edit(edit, edit.target) == (True, True, True, False)
        copied = score_edit(edit, edit.source)
        assert (copied.is_right, copied.is_made, copied.is_kept, copied.is_copy) == (False, False, True, True)
        for number, other in enumerate(edit.target.shapes):
            if other == edit.after:
                continue
            size = "small" if other.size == "large" else "large"
            changed = list(edit.target.shapes)
            changed[number] = other._replace(size=size)
            assert score_edit(edit, Scene.of(changed))[:3] == (False, True, False)
        free = {(0, 0), (0, 1), (1, 0), (1, 1)} - {s.cell for s in edit.target.shapes}
        if free:
            more = Scene.of([*edit.target.shapes, Shape("circle", "black", "small", *min(free))])
            assert not score_edit(edit, more).is_right


def test_what_is_added_may_be_in_any_free_cell():
    edit = next(e for e in map(ShapeEdits(32, "test").example, range(50)) if e.kind == "add")
    taken = {s.cell for s in edit.source.shapes}
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        if (row, column) not in taken:
            scene = Scene.of([*edit.source.shapes, edit.after._replace(row=row, column=column)])
            assert score_edit(edit, scene).is_right
    other = "red" if edit.after.colour != "red" else "blue"
    assert score_edit(edit, Scene.of([*edit.source.shapes, edit.after._replace(colour=other)]))[:3] == (
        False,
        False,
        True,
    )
