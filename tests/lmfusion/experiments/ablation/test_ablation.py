"""An ablation trains, measures and compares its variants, and continues after a kill."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import yaml

from lmfusion.cli import main
from lmfusion.evaluation.results import Score
from lmfusion.experiments.ablation import run as ablation_run
from lmfusion.experiments.ablation.config import AblationConfig
from lmfusion.experiments.ablation.measure import MeasuredTrainer, _accuracy, read_texts
from lmfusion.experiments.ablation.plot import draw_plot
from lmfusion.experiments.ablation.run import check_unchanged, run_ablation
from lmfusion.experiments.ablation.texts import PLAIN_TEXTS
from lmfusion.model.modeling import LMFusion
from lmfusion.training.trainer import Trainer
from lmfusion.utils.config_values import from_values, to_values
from lmfusion.utils.recipes import read_recipe
from tests.lmfusion.experiments.ablation.killed import ablate_and_die

RECIPES = Path(__file__).parents[4] / "recipes"


def config_of(values):
    return from_values(AblationConfig, values)


def numbers(summary):
    """Of each variant its curve, without seconds."""
    return {
        name: [{k: v for k, v in line.items() if k != "seconds"} for line in variant["curve"]]
        for name, variant in summary["variants"].items()
    }


def write(values, folder):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


@pytest.fixture
def recipe(values, tmp_path):
    return write(values, tmp_path)


def test_the_command_trains_measures_and_reports(recipe, values, capsys):
    assert main(["ablate", recipe]) == 0
    folder = Path(values["output"])
    summary = json.loads((folder / "ablation.json").read_text())
    assert list(summary["variants"]) == ["none-0", "deep-0", "none-1"]
    for name, variant in summary["variants"].items():
        trains_text = name == "none-1"
        assert [line["step"] for line in variant["curve"]] == [0, 2, 4]
        start, middle, final = variant["curve"]
        assert start == variant["start"] and final == variant["final"]
        assert start["tokens"] == 0 < middle["tokens"] < final["tokens"] <= 4 * 128
        assert 0 < middle["seconds"] <= final["seconds"]
        assert "diffusion_loss" not in start and middle["diffusion_loss"] > 0 and final["caption_loss"] > 0
        assert ("text_loss" in middle) == trains_text  # frozen text cannot have moved
        assert (final["text_loss"] == start["text_loss"]) != trains_text
        assert 0 <= final["image_accuracy_low"] <= final["image_accuracy"] <= final["image_accuracy_high"] <= 1
        assert variant["config"]["output"] == str(folder / name)
        assert variant["versions"]["torch"] and "commit" in variant
        assert (folder / name / "images.png").is_file() and not (folder / name / "checkpoints").exists()
    assert len({variant["start"]["text_loss"] for variant in summary["variants"].values()}) == 1
    trained = {name: variant["trained_parameters"] for name, variant in summary["variants"].items()}
    assert trained["none-0"] < trained["deep-0"] and trained["none-0"] < trained["none-1"]
    assert [claim["found"] for claim in summary["claims"]][:2] == [True, False]

    report = (folder / "ablation.md").read_text()
    assert report in capsys.readouterr().out and "NOT found" in report and "Tiny ablation" in report
    picture = (folder / "ablation.svg").read_text()
    assert all(f">{name}<" in picture for name in values["variants"])
    assert (folder / "ablation.png").read_bytes().startswith(b"\x89PNG")
    LMFusion.from_pretrained(folder / "deep-0" / "model")


def test_finished_variants_are_kept_and_changes_are_refused(values, tmp_path, monkeypatch, capsys):
    values["variants"].pop("none-1")
    values["claims"].pop(1)
    summary = run_ablation(config_of(values))
    began = []
    monkeypatch.setattr(ablation_run, "MeasuredTrainer", lambda run, measurer: began.append(run))
    assert run_ablation(config_of(values)) == summary and not began

    values["claims"] = values["claims"][:1]  # what is claimed may change
    assert len(run_ablation(config_of(values))["claims"]) == 1

    recipe = write(values, tmp_path)
    assert main(["ablate", recipe, "base.train.learning_rate=0.02"]) == 2
    assert "train.learning_rate was 0.01, is 0.02" in capsys.readouterr().err
    assert main(["ablate", recipe, "variants.deep-0={model.image.separation: shallow}"]) == 2
    assert "variants.deep-0 must be as when" in capsys.readouterr().err
    assert main(["ablate", recipe, "measure.texts=null"]) == 2
    assert "measure must be as when" in capsys.readouterr().err

    (Path(values["output"]) / "deep-0" / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result.json must be valid JSON, .* delete .*deep-0"):
        run_ablation(config_of(values))


def test_what_no_number_depends_on_may_change(values):
    run = config_of(values).runs()["deep-0"]
    begun = to_values(run)
    Path(run.output).mkdir(parents=True)
    path = Path(run.output) / "config.yaml"
    begun["output"] = "elsewhere"
    begun["checkpoint"]["every"] = begun["data"]["num_workers"] = 7
    begun["model"]["codec"]["sha256"] = "of the weights, which loading fills in"
    path.write_text(yaml.safe_dump(begun))
    check_unchanged("deep-0", run)
    begun["data"]["image_first"] = 0.5
    path.write_text(yaml.safe_dump(begun))
    with pytest.raises(
        ValueError, match=r"variants.deep-0 must be as when .* data.image_first was 0.5, is 0.2. Change it"
    ):
        check_unchanged("deep-0", run)


@pytest.mark.slow
def test_a_killed_ablation_continues_to_the_same_numbers(values, tmp_path):
    values["variants"].pop("deep-0")
    values["claims"] = []
    unbroken = run_ablation(config_of(values))
    again = values | {"output": str(tmp_path / "killed")}
    process = multiprocessing.get_context("forkserver").Process(target=ablate_and_die, args=(again, "none-1", 3))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    folder = Path(again["output"])
    lines = (folder / "none-1" / "measured.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2]
    before = (folder / "none-0" / "result.json").stat().st_mtime_ns
    resumed = run_ablation(config_of(again))
    assert numbers(resumed) == numbers(unbroken)
    assert resumed["variants"]["none-1"]["wall_seconds_are_since_step"] > 0
    assert (folder / "none-0" / "result.json").stat().st_mtime_ns == before


def test_a_signal_interrupts_with_exit_code_75(recipe, values, monkeypatch, capsys):
    real = MeasuredTrainer._advance

    def advance(trainer, *args):
        real(trainer, *args)
        if trainer.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MeasuredTrainer, "_advance", advance)
    command = ["ablate", recipe, "variants={deep-0: {model.image.separation: deep}}", "claims=[]"]
    assert main(command) == 75
    assert "interrupted" in capsys.readouterr().out
    assert not (Path(values["output"]) / "ablation.json").exists()
    monkeypatch.undo()
    assert main(command) == 0


def test_measuring_changes_nothing_of_a_run(values, tmp_path):
    """The weights of a measured run are those of `lmfusion train` with the same configuration."""
    run_ablation(config_of(values | {"variants": {"none-1": values["variants"]["none-1"]}, "claims": []}))
    plain = config_of(values | {"output": str(tmp_path / "plain")}).runs()["none-1"]
    assert Trainer(plain).run()
    ours, theirs = (Path(values["output"]) / "none-1", Path(plain.output))
    assert (ours / "validation.jsonl").read_text() == (theirs / "validation.jsonl").read_text()
    weights = [folder / "model" / "model.safetensors" for folder in (ours, theirs)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_accuracy_of_a_task_is_measured(values):
    pytest.importorskip("lm_eval")
    values["measure"] |= {"task": "everyday", "images": {}}
    values["variants"] = {"deep-0": values["variants"]["deep-0"]}
    values["claims"] = [{"claim": "knows the same", "metric": "text_accuracy", "keeps": ["deep-0"]}]
    summary = run_ablation(config_of(values))
    final = summary["variants"]["deep-0"]["final"]
    assert 0 < final["text_accuracy_low"] < final["text_accuracy"] < final["text_accuracy_high"] < 1
    assert summary["claims"][0]["found"] is True
    assert "image_accuracy" not in final


def test_accuracy_is_that_of_one_task_and_nothing_else():
    right, others = Score("piqa acc", 0.5), (Score("piqa acc_norm", 0.6), Score("gsm8k exact_match (strict)", 0.1))
    assert _accuracy("piqa", (right, *others)) is right
    for scores in (others, (right, Score("mmlu_law acc", 0.3)), ()):
        with pytest.raises(ValueError, match=r"measure.task must be one multiple-choice task .* got mine"):
            _accuracy("mine", scores)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("variants={}", "variants must name at least one"),
        ("variants={a/b: {}}", "must be valid names of folders, got 'a/b'"),
        (
            "variants.deep-0={train.num_step: 3}",
            "variants.deep-0 must be a valid training run: unknown key train.num_step",
        ),
        ("variants.deep-0={output: x}", "variants.deep-0.output must be left out"),
        (
            "variants.deep-0={train.seed: 2, train.seed.x: 1}",
            "variants.deep-0.train.seed.x must be below a section, but train.seed is a value",
        ),
        ("base.output=x", "base.output must be left out: it is always <output of the ablation>"),
        ("base.validation.every=3", "base.validation.every must be left out: measure.every sets it"),
        ("base.validation.sources=[]", "base.validation.sources must name held-out images"),
        (
            "measure.every=3",
            "train.num_steps of variants.none-0 must be a multiple of measure.every, 3, so that",
        ),
        ("base.train.log_every=4", "measure.every must be a multiple of train.log_every, 4,"),
        ("measure.texts=nowhere.txt", "measure.texts must be an existing file, got nowhere.txt"),
        ("measure.task=nowhere.yaml", "must name existing YAML files, got nowhere.yaml"),
        ("measure.images.sampler=best", "measure.images.sampler must be one of "),
        (
            "measure.images.num_images=100000",
            "measure.images.num_images must be at most 1000, the held-out captions, got 100000",
        ),
        ("base.model.codec.image_size=8", "image_size must be at least 16 pixels"),
        (
            "claims=[{claim: c, metric: text_loss, keeps: [other]}]",
            "must name variants out of none-0, deep-0, none-1, got other",
        ),
        (
            "claims=[{claim: c, metric: image_accuracy, order: [none-0, deep-0]}]",
            "measure.images.num_images must be above 0 for the claim",
        ),
        ("colour=red", "unknown key colour"),
    ],
)
def test_bad_recipes_give_one_clear_error(recipe, override, message, capsys, values):
    without_images = ["measure.images.num_images=0"] if "image_accuracy" in override else []
    assert main(["ablate", recipe, *without_images, override]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(Path(values["output"]).glob("*/config.yaml"))


def test_texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("One\ntext.\n\n\n\nAnother.\n")
    assert read_texts(str(path)) == ["One\ntext.", "Another."]
    assert read_texts(None) == list(PLAIN_TEXTS)
    path.write_text(" \n\n")
    with pytest.raises(ValueError, match="must hold texts"):
        read_texts(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="must be UTF-8"):
        read_texts(str(path))


def test_plot_shows_only_what_was_measured_and_more_variants_than_colours(tmp_path):
    curves = {f"v{i}": [{"step": 0}, {"step": 1, "caption_loss": float(i)}] for i in range(12)}
    svg, png = draw_plot(curves, "Title", tmp_path)
    text = svg.read_text()
    assert "Caption loss" in text and "Diffusion loss" not in text and all(f">{name}<" in text for name in curves)
    first = svg.read_bytes(), png.read_bytes()
    draw_plot(curves, "Title", tmp_path)
    assert (svg.read_bytes(), png.read_bytes()) == first


def test_a_missing_matplotlib_is_reported_first(values, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs matplotlib, which is not installed; pip install matplotlib"):
        run_ablation(config_of(values))


def test_the_recipe_has_the_papers_variants():
    config = read_recipe(AblationConfig, RECIPES / "ablation.yaml")
    cells = {(run.model.image.separation, run.train.text_learning_rate_ratio) for run in config.runs().values()}
    assert cells == {("none", 0), ("shallow", 0), ("deep", 0), ("none", 0.1), ("none", 1), ("deep", 0.1), ("deep", 1)}
    assert len({(run.train.num_steps, run.train.learning_rate, run.train.seed) for run in config.runs().values()}) == 1
