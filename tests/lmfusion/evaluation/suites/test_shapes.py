"""The suites of the shapes world: a model that follows every prompt gets full marks, and others get what is due."""

from types import SimpleNamespace

import pytest
from PIL import Image

from lmfusion.evaluation.suites.edits import EditsConfig, EditsSuite, held_out_edits
from lmfusion.evaluation.suites.shapes import ShapesConfig, ShapesSuite, held_out_captions
from lmfusion.model.modeling import LMFusion
from lmfusion.synthetic.shape_reader import read_scene
from lmfusion.synthetic.shapes import EDITS, KINDS, NUM_SAMPLES, SKILLS, Scene, render

SIZE = 24


class Painter:
    """A model that generates for each prompt what `paint` makes of it."""

    def __init__(self, paint):
        self.paint = paint
        self.codec = SimpleNamespace(config=SimpleNamespace(image_size=SIZE))
        self.options = None

    def draw(self, prompts, **options):
        self.options = options
        return [self.paint(prompt) for prompt in prompts]


def values(result):
    return {score.name: score.value for score in result.scores}


def follow_captions(num_per_skill):
    scenes = {str(e.description): e.scene for e in held_out_captions(num_per_skill)}
    return lambda caption: render(scenes[caption], SIZE)


@pytest.mark.parametrize("suite", [ShapesSuite, EditsSuite])
def test_images_too_small_to_be_read_are_refused_before_any_is_generated(suite, tmp_path):
    painter = Painter(None)
    painter.codec.config.image_size = 8
    with pytest.raises(ValueError, match="image_size must be at least 16 pixels to distinguish shapes, got 8"):
        suite(suite.config_type(1)).run(painter, tmp_path)


def test_captions_are_held_out_and_equally_many_of_each_skill():
    chosen = held_out_captions(20)
    assert [e.skill for e in chosen] == [skill for skill in SKILLS for _ in range(20)]
    with pytest.raises(ValueError, match=r"shapes.num_per_skill must be at most .* in the test split, got 400"):
        ShapesConfig(num_per_skill=400)


def test_a_perfect_painter(tmp_path):
    model = Painter(follow_captions(4))
    config = ShapesConfig(num_per_skill=4, guidance_scale=3.0, num_steps=7, seed=5, num_shown=2)
    result = ShapesSuite(config).run(model, tmp_path)
    assert values(result) == {f"shapes: {skill}": 1.0 for skill in SKILLS} | {"shapes": 1.0}
    assert [score.count for score in result.scores] == [4] * len(SKILLS) + [4 * len(SKILLS)]
    assert model.options == {
        "batch_size": 32, "guidance_scale": 3.0, "sampler": "dpm-solver", "num_steps": 7, "seed": 5,
    }  # fmt: skip
    [picture] = result.pictures
    assert Image.open(tmp_path / picture.file).width > 2 * SIZE
    assert [row[0] for row in result.tables[0].rows] == [*SKILLS, "together"]
    assert result.settings["num_steps"] == 7 and result.from_json(result.to_json()).scores == result.scores


def test_a_painter_of_other_kinds_gets_the_count_right_and_the_rest_wrong(tmp_path):
    perfect = follow_captions(4)

    def other(caption):
        scene = read_scene(perfect(caption))
        return render(Scene.of([s._replace(kind=KINDS[KINDS.index(s.kind) - 1]) for s in scene.shapes]), SIZE)

    result = ShapesSuite(ShapesConfig(num_per_skill=4, num_shown=0)).run(Painter(other), tmp_path)
    assert set(values(result).values()) == {0.0} and result.pictures == ()
    assert {row[3:5] for row in result.tables[0].rows} == {("1.00", "1.00")}


def test_a_painter_that_cannot_count(tmp_path):
    perfect = follow_captions(4)

    def one_too_few(caption):
        scene = read_scene(perfect(caption))
        return render(Scene(scene.shapes[: max(1, len(scene.shapes) - 1)]), SIZE)

    result = values(ShapesSuite(ShapesConfig(num_per_skill=4)).run(Painter(one_too_few), tmp_path))
    assert [result[f"shapes: {skill}"] for skill in SKILLS] == [1, 1, 1, 0, 0, 0] and result["shapes"] == 0.5


def follow_instructions(num_per_kind):
    edits = {(read_scene(render(e.source, SIZE)), e.instruction): e for e in held_out_edits(num_per_kind)}
    return lambda prompt: render(edits[read_scene(prompt[1]), prompt[0]].target, SIZE)


def test_a_perfect_editor(tmp_path):
    model = Painter(follow_instructions(3))
    config = EditsConfig(num_per_kind=3, image_guidance_scale=1.5, num_shown=1)
    result = EditsSuite(config).run(model, tmp_path)
    expected = {f"edits: {kind}": 1.0 for kind in EDITS} | {"edits": 1.0, "edits: did nothing": 0.0}
    assert values(result) == expected and model.options["image_guidance_scale"] == 1.5
    assert (tmp_path / result.pictures[0].file).is_file()
    assert result.tables[0].rows[-1][3:] == ("1.00", "1.00", "0.00", "12")


def test_an_editor_that_copies_keeps_everything_and_is_wrong(tmp_path):
    result = EditsSuite(EditsConfig(num_per_kind=3)).run(Painter(lambda prompt: prompt[1]), tmp_path)
    expected = {f"edits: {kind}": 0.0 for kind in EDITS} | {"edits": 0.0, "edits: did nothing": 1.0}
    assert values(result) == expected
    assert result.tables[0].rows[-1][3:6] == ("0.00", "1.00", "1.00")


def test_an_editor_that_loses_the_rest_is_wrong(tmp_path):
    perfect = follow_instructions(3)

    def only_new(prompt):
        source, target = read_scene(prompt[1]).shapes, read_scene(perfect(prompt)).shapes
        return render(Scene(tuple(s for s in target if s not in source)), SIZE)

    result = EditsSuite(EditsConfig(num_per_kind=3)).run(Painter(only_new), tmp_path)
    assert values(result)["edits"] == 0.0
    assert result.tables[0].rows[-1][3:5] == ("1.00", "0.00")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShapesConfig(sampler="euler"), "shapes.sampler must be one of .* got 'euler'"),
        (lambda: ShapesConfig(num_steps=0), "shapes.num_steps must be at least 1, got 0"),
        (
            lambda: ShapesConfig(guidance_scale=float("nan")),
            "shapes.guidance_scale must be between 0 and 1,000, got nan",
        ),
        (lambda: EditsConfig(sampler="euler"), "edits.sampler must be one of .* got 'euler'"),
        (
            lambda: EditsConfig(image_guidance_scale=-1.0),
            "edits.image_guidance_scale must be between 0 and 1,000, got -1",
        ),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_too_many_edits_are_refused(monkeypatch):
    monkeypatch.setitem(NUM_SAMPLES, "test", 12)
    with pytest.raises(ValueError, match=r"edits.num_per_kind must be at most .* in the test split, got 13"):
        EditsConfig(num_per_kind=13)


def test_a_real_model_runs_through_both(tiny_llama, tmp_path):
    model = LMFusion.from_llm(
        tiny_llama,
        image={"hidden_size": 16, "patch_coder": {"kind": "linear", "patch_size": 8}},
        codec={"kind": "pixels", "image_size": 16},
    ).eval()
    quick = {"sampler": "ddim", "num_steps": 2}
    shapes = ShapesSuite(ShapesConfig(num_per_skill=1, **quick)).run(model, tmp_path / "new")
    edits = EditsSuite(EditsConfig(num_per_kind=1, **quick)).run(model, tmp_path / "new")
    assert (len(shapes.scores), len(edits.scores)) == (7, 6)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"shapes.png", "edits.png"}
