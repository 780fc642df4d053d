"""`lmfusion eval` checks first, keeps finished suites, and writes a complete page."""

import json
import re
import typing
from pathlib import Path

import pytest
import torch
import yaml

from lmfusion import LMFusion
from lmfusion.cli import main
from lmfusion.evaluation import run as run_module
from lmfusion.evaluation.config import EvalConfig
from lmfusion.evaluation.results import SampleImage, Score, SuiteResult, Table
from lmfusion.evaluation.run import run_evaluation
from lmfusion.evaluation.suites import SUITES, load_suite
from lmfusion.evaluation.suites.captions import CaptionsSuite
from lmfusion.experiments.ablation.config import ClaimConfig, MeasureConfig
from lmfusion.utils.config_values import from_values
from lmfusion.utils.recipes import read_recipe
from tests.lmfusion.evaluation.coco_layout import save_coco
from tests.lmfusion.evaluation.metrics.clip_folder import save_clip

ROOT = Path(__file__).resolve().parents[3]
RECIPES, GUIDE = ROOT / "recipes" / "eval", ROOT / "docs" / "evaluation.md"


@pytest.fixture
def recipe(tiny_folder, tmp_path):
    values = {
        "output": str(tmp_path / "out"),
        "model": str(tiny_folder),
        "images": {
            "source": {"kind": "digits", "split": "test"},
            "num_images": 4,
            "sampler": "dpm-solver",
            "num_steps": 2,
            "extractors": [],
        },
        "captions": {"source": {"kind": "digits", "split": "test"}, "num_images": 3, "max_new_tokens": 3},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def results_of(out):
    return json.loads((out / "eval.json").read_text())


def test_the_command_writes_results_and_a_page(recipe, out, capsys):
    assert main(["eval", str(recipe), "captions.num_shown=1"]) == 0
    printed = capsys.readouterr().out
    assert "CIDEr-D" in printed
    assert f"open {out}/index.html" in printed
    values = results_of(out)
    assert list(values["suites"]) == ["images", "captions"]
    assert values["suites"]["captions"]["seconds"] > 0
    assert values["model"]["base"]["sha256"]
    assert re.fullmatch("[0-9a-f]{64}", values["config_sha256"])
    assert values["suites"]["captions"]["made"] == {name: values[name] for name in ("commit", "device", "date")}
    assert values["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", values["commit"])
    page = (out / "index.html").read_text()
    assert f"lmfusion eval {recipe} captions.num_shown=1" in page
    assert values["model"]["sha256"] in page
    assert "exact match" in page
    pictures = re.findall('<img[^>]* src="([^"]*)"', page)
    assert len(pictures) == 4 + 1
    assert all((out / picture).is_file() for picture in pictures)
    assert "http" not in page.replace("https://www.w3.org", "")  # it needs no network


def test_finished_suites_are_kept_until_something_changes(recipe, out, capsys, monkeypatch):
    main(["eval", str(recipe)])
    before = results_of(out)
    ran = []
    run = CaptionsSuite.run
    monkeypatch.setattr(CaptionsSuite, "run", lambda *args: ran.append("captions") or run(*args))
    capsys.readouterr()
    monkeypatch.setattr(run_module, "commit", lambda: "another")
    main(["eval", str(recipe), "images.batch_size=3"])
    assert ran == []
    made = {name: suite["made"]["commit"] for name, suite in results_of(out)["suites"].items()}
    assert made == {"images": "another", "captions": before["commit"]}
    assert "captions: already in" in capsys.readouterr().out
    assert results_of(out)["suites"]["captions"] == before["suites"]["captions"]
    main(["eval", str(recipe), "captions.num_images=2"])
    assert ran == ["captions"]
    (out / "eval.json").write_text("{damaged")
    main(["eval", str(recipe)])
    assert ran == ["captions"] * 2
    next((out / "captions").glob("*.png")).unlink()
    main(["eval", str(recipe)])
    assert ran == ["captions"] * 3


def test_a_killed_run_continues(recipe, out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(CaptionsSuite, "run", interrupted)
        assert main(["eval", str(recipe)]) == 130
    first = results_of(out)
    assert list(first["suites"]) == ["images"]
    assert "Captions" not in (out / "index.html").read_text()
    main(["eval", str(recipe)])
    assert results_of(out)["suites"]["images"] == first["suites"]["images"]
    assert list(results_of(out)["suites"]) == ["images", "captions"]


def test_scores_of_another_model_are_dropped_at_once(recipe, out, tmp_path, tiny_folder, monkeypatch):
    main(["eval", str(recipe), "images.num_images=2"])
    other = LMFusion.from_pretrained(tiny_folder)
    with torch.no_grad():
        other.image.norm.weight[0] += 1
    other.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(CaptionsSuite, "run", interrupted)
    assert main(["eval", str(recipe), "images.num_images=2", f"model={tmp_path / 'other'}"]) == 130
    assert list(results_of(out)["suites"]) == ["images"]


def interrupted(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["model=nowhere"], "model must be the folder of a trained model, got nowhere"),
        (["images.clip=nowhere"], "images.clip"),
        (
            ["captions.coco={annotations: a, images: b}", "captions.source=null"],
            "captions.coco.annotations must be an existing file, got a",
        ),
        (["language={tasks: [none.yaml]}"], "existing YAML files, got none.yaml"),
        (["images=null", "captions=null"], "must name at least one suite"),
        (["device=tpu"], "device must be one of auto, cpu, cuda, got 'tpu'"),
        (["dtype=float8"], "for that of the file, got 'float8'"),
        (["imagse={}"], "did you mean images"),
    ],
)
def test_errors_are_reported_before_anything_runs(recipe, out, overrides, reason, capsys):
    assert main(["eval", str(recipe), *overrides]) == 2
    assert reason in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_a_bad_output_is_reported_before_the_model_is_loaded(recipe, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for output in ("file", "file/inside"):
        assert main(["eval", str(recipe), "model=nowhere", f"output={tmp_path / output}"]) == 2
        assert "file is a file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_the_papers_protocol_on_data_of_its_layout(tiny_folder, tmp_path, own_cache):
    """recipes/eval/coco.yaml from end to end, with a few pictures and random networks in place of the real ones."""
    coco = save_coco(tmp_path / "coco")
    piqa = tmp_path / "piqa.jsonl"
    piqa.write_text(json.dumps({"goal": "Dry a plate", "sol1": "with a towel", "sol2": "with soup", "label": 0}) + "\n")
    config = read_recipe(
        EvalConfig,
        RECIPES / "coco.yaml",
        [
            f"output={tmp_path / 'out'}",
            f"model={tiny_folder}",
            "language.tasks=[piqa]",
            f"language.data={{piqa: {piqa}}}",
            "language.verify=false",
            f"images.coco={{annotations: {coco}/annotations/captions_val2014.json, images: {coco}/val2014}}",
            "images.num_images=7",
            "images.num_steps=2",
            "images.extractors=[{kind: efficientnet-lite0}]",
            f"images.clip={save_clip(tmp_path / 'clip')}",
            f"captions.coco={{annotations: {coco}/dataset_coco.json, images: {coco}, split: test}}",
            "captions.max_new_tokens=3",
        ],
    )
    pytest.importorskip("lm_eval")
    pytest.importorskip("efficientnet_lite_pytorch")
    values = run_evaluation(config)
    scores = {suite: {s["name"]: s for s in found["scores"]} for suite, found in values["suites"].items()}
    assert scores["language"]["piqa acc"]["count"] == 1
    frechet = scores["images"]["Frechet distance (EfficientNet-Lite0), guidance 1.55"]
    assert frechet["count"] == 7
    assert frechet["details"]["real images"] == 6
    assert frechet["details"]["steps"] == 2
    assert scores["images"]["CLIP score, guidance 1"]["count"] == 7
    assert scores["captions"]["CIDEr-D"]["count"] == 4
    assert scores["captions"]["CIDEr-D"]["details"]["references per image"] == 5


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL))
def test_every_recipe_of_the_guide_reads(block):
    values = yaml.safe_load(block)
    if "variants" in values:  # an ablation, whose base is left out
        assert from_values(MeasureConfig, values.pop("measure"))
        assert all(from_values(ClaimConfig, claim) for claim in values.pop("claims"))
        assert set(values) == {"output", "base", "variants"}
    else:
        assert from_values(EvalConfig, {"output": "out", "model": "model", **values}).suites


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_reads(path):
    assert read_recipe(EvalConfig, path).suites


def test_each_suite_has_its_key_in_recipes():
    hints = typing.get_type_hints(EvalConfig)
    assert {name: hints[name] for name in SUITES} == {name: load_suite(name).config_type | None for name in SUITES}
    assert [name for name in hints if name in SUITES] == list(SUITES)
    assert len(hints) == 6 + len(SUITES)  # all others are the model's


def test_the_papers_settings():
    config = read_recipe(EvalConfig, RECIPES / "coco.yaml")
    assert config.language.tasks == ["hellaswag", "piqa", "social_iqa", "winogrande"]
    assert (config.images.num_images, config.images.num_steps, config.images.sampler) == (30_000, 250, "ddpm")
    assert config.images.guidance_scales == [1.0, 1.55]
    assert config.captions.coco.split == "test"


def test_results_survive_json():
    result = SuiteResult(
        "images",
        (Score("a", float("nan")), Score("b", 1.5, 1.0, 2.0, 7, {"x": (1, 2)})),
        {"steps": 3},
        2.5,
        (Table("t", ("p", "q"), (("1", "2"),)),),
        (SampleImage("x.png", "y"),),
    )
    text = json.dumps(result.to_json(), allow_nan=False)
    again = SuiteResult.from_json(json.loads(text))
    assert again.scores[1] == Score("b", 1.5, 1.0, 2.0, 7, {"x": [1, 2]})
    assert again.scores[0].value != again.scores[0].value
    assert again.tables == result.tables
    assert again.pictures == result.pictures
    assert str(again.scores[1]) == "1.5 [1, 2]"
    with pytest.raises(ValueError, match="must have both ends of its interval"):
        Score("c", 1.0, low=0.5)
    with pytest.raises(ValueError, match="must have 2 cells, got 1"):
        Table("t", ("p", "q"), (("1",),))
