"""The shapes world: its splits share no scene, its samples depend on nothing but their number, its words are true."""

import numpy as np
import pytest

from lmfusion.data import CaptionedImage, Edit, SourceConfig, load_source
from lmfusion.synthetic.shapes import (
    COLOURS,
    EDITS,
    SKILLS,
    Scene,
    Shape,
    ShapeEdits,
    Shapes,
    caption,
    describe,
    is_held_out,
    render,
)

NUM = 400


@pytest.fixture(scope="module")
def examples():
    return {split: [Shapes(32, split).example(i) for i in range(NUM)] for split in ("train", "test")}


@pytest.fixture(scope="module")
def edits():
    return {split: [ShapeEdits(32, split).example(i) for i in range(NUM)] for split in ("train", "test")}


def shape(words, row=0, column=0):
    size, colour, kind = words.split()
    return Shape(kind, colour, size, row, column)


def test_sizes_and_kinds_of_the_sources():
    for kind, sample_type in (("shapes", CaptionedImage), ("shape_edits", Edit)):
        for split, size in (("train", 20_000), ("test", 1_000)):
            source = load_source(SourceConfig(kind, split=split), 24)
            assert len(source) == size and sum(source.blocks) == size
            assert isinstance(source[size - 1], sample_type)
            with pytest.raises(IndexError):
                source[size]
        with pytest.raises(ValueError, match="which take none"):
            SourceConfig(kind, path="x")


def test_a_sample_depends_on_split_and_number_alone(examples):
    again = [Shapes(99, "train").example(i) for i in (5, 3, 3)]
    assert again == [examples["train"][i] for i in (5, 3, 3)]
    assert examples["train"] != examples["test"]
    first, other = load_source(SourceConfig("shapes"), 24)[7], load_source(SourceConfig("shapes"), 48)[7]
    assert first.captions == other.captions and first.sample_id == other.sample_id
    assert (first.load_image().size, other.load_image().size) == ((24, 24), (48, 48))


def test_no_scene_of_the_test_split_is_in_training(examples, edits):
    scenes = {
        split: [e.scene for e in examples[split]] + [s for e in edits[split] for s in (e.source, e.target)]
        for split in ("train", "test")
    }
    assert not any(map(is_held_out, scenes["train"])) and all(map(is_held_out, scenes["test"]))
    captions = {
        split: {str(e.description) for e in examples[split] if e.skill != "single"} for split in ("train", "test")
    }
    assert len(captions["test"]) > 80 and not captions["train"] & captions["test"]


def test_what_is_held_out_is_content():
    scene = Scene((shape("small red circle"), shape("large blue square", 0, 1)))
    held_out = is_held_out(scene)
    for moved in (
        Scene(tuple(s._replace(row=1) for s in scene.shapes)),
        Scene(tuple(s._replace(size="small") for s in scene.shapes)),
    ):
        assert is_held_out(moved) == held_out
    alone = [is_held_out(Scene((Shape("circle", colour, "small", 0, 0),))) for colour in COLOURS]
    assert sum(alone) == 1


def test_every_skill_and_edit_occurs_and_words_fit_what_is_shown(examples, edits):
    for split in ("train", "test"):
        assert {e.skill for e in examples[split]} == set(SKILLS)
        assert all(e.description.fits(e.scene) for e in examples[split])
        assert {e.kind for e in edits[split]} == set(EDITS)
        for edit in edits[split]:
            before, after = set(edit.source.shapes), set(edit.target.shapes)
            changed = (before - after, after - before)
            assert changed == ({edit.before} - {None}, {edit.after} - {None})
            cells = [s.cell for s in edit.target.shapes]
            assert len(set(cells)) == len(cells) and cells == sorted(cells)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([shape("small red circle", 1, 1)], "a small red circle"),
        ([shape("large blue square", 0, i) for i in (0, 1)] + [shape("large blue square", 1, 0)],
         "three large blue squares"),
        ([shape("large red circle"), shape("small black square", 0, 1)],
         "a large red circle left of a small black square"),
        ([shape("large red circle"), shape("small black square", 1, 0)],
         "a large red circle above a small black square"),
    ],
)  # fmt: skip
def test_captions(shapes, words):
    scene = Scene.of(shapes)
    assert caption(scene) == words and describe(scene).fits(scene)


def test_a_scene_that_no_caption_tells_of():
    diagonal = Scene((shape("large red circle"), shape("small black square", 1, 1)))
    with pytest.raises(ValueError, match=r"a scene with a caption must have .*, got 2 others"):
        caption(diagonal)


def test_instructions_name_one_shape_and_what_becomes_of_it(edits):
    for edit in edits["train"] + edits["test"]:
        words = edit.instruction.split()
        if edit.kind == "add":
            assert words == ["add", "a", edit.after.size, edit.after.colour, edit.after.kind]
            continue
        assert words[0] == {"recolour": "make"}.get(edit.kind, edit.kind) and words[1] == "the"
        named = words[2:4] if words[2] in COLOURS else words[2:3]
        meant = [s for s in edit.source.shapes if set(named) <= {s.kind, s.colour}]
        assert meant == [edit.before]
        rest = words[2 + len(named) :]
        if edit.kind == "recolour":
            assert rest == [edit.after.colour]
        if edit.kind == "move":
            row, column = edit.after.cell
            assert rest == [
                "to",
                "the",
                ("top", "bottom")[row] if row != edit.before.row else ("left", "right")[column],
            ]


def test_pictures():
    scene = Scene((shape("large red circle"), shape("small black square", 1, 1)))
    pixels = np.asarray(render(scene, 40))
    assert pixels.shape == (40, 40, 3)
    assert tuple(pixels[10, 10]) == COLOURS["red"] and tuple(pixels[30, 30]) == COLOURS["black"]
    assert (pixels[0] == 255).all() and (pixels[:20, 20:] == 255).all()
    with pytest.raises(ValueError, match=r"image_size must be at least 16 pixels .*, got 15"):
        render(scene, 15)


def test_an_unknown_split():
    for source in (Shapes, ShapeEdits):
        with pytest.raises(ValueError, match="split must be one of train, test, got 'all'"):
            source(32, "all")
