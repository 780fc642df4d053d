"""The training loop: exact accumulation, what is trained and exported, stops before a bad update, no waiting."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from lmfusion import LMFusion
from lmfusion.data.pipeline.loader import LoaderState, Step
from lmfusion.training.config import RunConfig
from lmfusion.training.distributed import World
from lmfusion.training.optimizer import learning_rate
from lmfusion.training.step import CollectiveError, NonFiniteError, agreed_steps, fetch_metrics
from lmfusion.training.trainer import Trainer
from lmfusion.utils.config_values import from_values
from tests.lmfusion.training.poison import poison
from tests.lmfusion.training.runs import assert_same_run, final_tensors, read_metrics


def test_metrics_and_learning(config):
    run = config(train__num_steps=60, train__learning_rate=1e-2, train__log_every=20, train__batch_tokens=384)
    assert Trainer(run).run()
    first, _, last = read_metrics(run)
    assert (first["step"], last["step"]) == (20, 60)
    assert last["epoch"] == pytest.approx(last["num_samples"] / 1438)
    assert last["lm_loss"] < first["lm_loss"] - 0.02  # a random text tower can learn little
    assert last["diffusion_loss"] < first["diffusion_loss"] - 0.05
    assert last["learning_rate"] == pytest.approx(1.5e-5)
    weight = 5 * last["diffusion_loss"] + last["lm_loss"] + last["boi_loss"]
    assert last["loss"] == pytest.approx(weight, rel=0.05)  # means of steps with different numbers of labels
    assert 0.9 < last["packing"] <= 1 and last["num_damaged"] == last["num_cut"] == 0


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


def test_micro_batches_add_up_to_the_means_over_the_whole_step(config):
    trainer = Trainer(config(train__max_grad_norm=1e9))
    steps = trainer.loader.steps(LoaderState(), 1)
    step, totals = next(agreed_steps(steps, trainer.world, lambda batch: 1))
    assert len(step.batches) == totals.num_flops == 2
    outputs = [trainer.model(batch=batch) for batch in step.batches]
    lm_loss = sum(output.lm_loss_sum for output in outputs) / sum(batch.num_labels for batch in step.batches)
    boi_loss = sum(output.boi_loss_sum for output in outputs) / sum(batch.num_boi_targets for batch in step.batches)
    diffusion_loss = sum(output.diffusion_loss_sum for output in outputs) / sum(
        batch.num_images for batch in step.batches
    )
    names = list(trainer.weights)
    expected = torch.autograd.grad(lm_loss + boi_loss + 5 * diffusion_loss, [trainer.weights[name] for name in names])
    found = {}
    real = trainer.optimizer.step

    def step_with_gradients(*args):
        found.update({name: weight.grad.clone() for name, weight in trainer.weights.items()})
        return real(*args)

    trainer.optimizer.step = step_with_gradients
    trainer._updater.update(trainer.progress, step, totals, batch_tokens=256)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


class NoReading(TorchDispatchMode):
    """Raises an error when the host reads a number from a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a number was read from a tensor")
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_from_the_device_between_lines(config, monkeypatch):
    with NoReading(), pytest.raises(AssertionError, match="was read"):
        float(torch.ones(()) + 1)
    num_reads = []
    for name in ("tolist", "cpu", "numpy"):
        real = getattr(torch.Tensor, name)

        def counted(self, *args, real=real):
            num_reads.append(self.shape)
            return real(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    trainer = Trainer(config(train__log_every=5, checkpoint__every=100, data__num_workers=0))
    update, reads_in_updates = trainer._updater.update, []

    def update_without_reading(*args):
        before = len(num_reads)
        with NoReading():
            made = update(*args)
        reads_in_updates.append(len(num_reads) - before)
        return made

    trainer._updater.update = update_without_reading
    reads = []

    def counted_fetch(updates, model):
        reads.append(len(updates))
        return fetch_metrics(updates, model)

    monkeypatch.setattr("lmfusion.training.trainer.fetch_metrics", counted_fetch)
    assert trainer.run(max_steps=12)
    assert reads_in_updates == [0] * 12
    assert [n for n in reads if n] == [5, 5, 2], "a line each five steps, and the checkpoint at the end"


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
def test_training_starts_from_an_adapted_model(config, unbroken, dtype):
    model = {"adapted": str(Path(unbroken.output) / "model")}
    trainer = Trainer(config("further", model=model, train__num_steps=2, train__dtype=dtype))
    name = "image.layers.0.mlp.down_proj.weight"
    assert torch.equal(trainer.weights[name], final_tensors(unbroken)["ema"][name])
    assert trainer.run()
    assert LMFusion.from_pretrained(Path(trainer.config.output) / "model").text.norm.weight.dtype == torch.float32


def test_samples_are_generated_with_the_averages(config):
    from PIL import Image

    run = config(sample__prompts=["a handwritten one", "two"], sample__every=2, sample__num_steps=2, train__num_steps=4)
    assert Trainer(run).run()
    names = sorted(path.name for path in (Path(run.output) / "samples").iterdir())
    assert names == ["step-00000002.png", "step-00000004.png"]
    picture = Image.open(Path(run.output) / "samples" / names[0])
    assert picture.size == (4 * 66 + 2, 2 * 66 + 2)


def test_sampling_changes_no_number(config, unbroken):
    run = config("drawn", sample__prompts=["one"], sample__every=3, sample__num_steps=2)
    assert Trainer(run).run()
    assert_same_run(unbroken, run)


def test_non_finite_loss_leaves_everything_as_it_was_before_its_step(config):
    expected, run = config("expected", train__log_every=5), config("run", train__log_every=5)
    assert Trainer(expected).run(max_steps=7)
    trainer = Trainer(run)
    poisoned = poison(trainer, 8)
    with pytest.raises(NonFiniteError, match="step 8: the loss is not finite; no update was made") as caught:
        trainer.run()
    named = str(caught.value).split("samples: ")[1].split(", ")
    assert poisoned[0] in named and 1 < len(named) < 8, "those of its sequence"
    assert trainer.step == 7
    assert_same_run(expected, run, step=7)
    for name, tensor in final_tensors(run, 7)["weights"].items():
        assert torch.equal(trainer.weights[name], tensor), "what is in memory is that too"
    assert Trainer(run).run() and Trainer(expected).run()  # with the sample repaired
    assert_same_run(expected, run)


def test_non_finite_gradient_stops_before_the_update(config):
    trainer = Trainer(config())
    weight = trainer.weights["image.norm.weight"]
    before = weight.detach().clone()
    weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteError, match="step 1: the gradient is not finite") as caught:
        trainer.run()
    assert torch.equal(weight, before)
    assert len(str(caught.value).split(", ")) >= 8, "all samples of the step"


@pytest.mark.slow  # torchao's AdamW is compiled
def test_8_bit_optimizer_stops_before_the_update_too(config):
    pytest.importorskip("torchao")
    trainer = Trainer(config(train__optimizer="adamw_8bit", train__log_every=5))
    poison(trainer, 2)
    with pytest.raises(NonFiniteError, match="step 2: the loss is not finite"):
        trainer.run()
    assert all(weight.isfinite().all() for weight in trainer.weights.values())
    assert Trainer(trainer.config).step == 1


def test_error_while_reading_data_costs_no_step_before_it(config):
    run = config(checkpoint__every=100)
    trainer = Trainer(run)
    real = trainer.loader.steps

    def steps(state, num_steps):
        for i, step in enumerate(real(state, num_steps)):
            if i == 5:
                raise ValueError("sample digits/7: its latents have another shape")
            yield step

    trainer.loader.steps = steps
    with pytest.raises(CollectiveError, match="digits/7"):
        trainer.run()
    assert Trainer(run).step == 5


@pytest.fixture
def broken_folder(tmp_path):
    """Forty images with captions, the tenth of them damaged."""
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(40):
        Image.new("L", (8, 8), i).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"image {i}")
        if i % 10 == 3:
            (folder / f"{i:02d}.png").write_bytes(b"no image")
    return folder


def test_damaged_samples_are_counted_and_named(config, broken_folder):
    sources = [{"kind": "folder", "path": str(broken_folder)}]
    data = {"sources": sources, "pack_window": 40, "seq_len": 128, "max_damaged": 0.5}
    run, again = (config(name, data=data) for name in ("run", "again"))
    assert Trainer(run).run()
    lines = read_metrics(run)
    damaged = [json.loads(line) for line in (Path(run.output) / "damaged.jsonl").read_text().splitlines()]
    assert lines[-1]["num_damaged"] == len(damaged) >= 4
    assert {line["sample_id"][:2] for line in damaged} <= {"03", "13", "23", "33"}
    for max_steps in (5, 12):
        Trainer(again).run(max_steps=max_steps)
    assert_same_run(run, again)
    assert (Path(again.output) / "damaged.jsonl").read_text() == (Path(run.output) / "damaged.jsonl").read_text()


def test_skip_logs_of_former_ranks_are_trimmed_too(config):
    run = config()
    assert Trainer(run).run(max_steps=4)
    left = Path(run.output) / "damaged.rank-3.jsonl"
    left.write_text('{"step": 3, "sample_id": "a"}\n{"step": 5, "sample_id": "b"}\n')
    assert Trainer(run).run()
    assert left.read_text() == '{"step": 3, "sample_id": "a"}\n'


def test_too_many_damaged_samples_stop_the_run_at_once(config, broken_folder):
    sources = [{"kind": "folder", "path": str(broken_folder)}]
    run = config(data__sources=sources, data__pack_window=40, data__max_damaged=0.002)
    with pytest.raises(CollectiveError, match=r"at most data\.max_damaged, 0\.002, got 3 of "):
        Trainer(run).run()
    step = Trainer(run).step
    assert 0 < step < 12 and read_metrics(run)[-1]["step"] == step
    with pytest.raises(CollectiveError, match="share of damaged samples"):
        Trainer(run).run()
    assert Trainer(config(data__sources=sources, data__pack_window=40, data__max_damaged=0.5)).run()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_named(config):
    with pytest.raises(ValueError, match=r"train\.device must be auto or cpu where PyTorch finds no GPU"):
        Trainer(config(train__device="cuda"))


def test_resolved_config_is_written_down(config, unbroken):
    values = yaml.safe_load((Path(unbroken.output) / "config.yaml").read_text())
    assert from_values(RunConfig, values) == unbroken


def test_profile_records_the_steps_asked_for(config):
    run = config(train__profile=[2, 3], train__num_steps=4)
    assert Trainer(run).run()
    trace = json.loads((Path(run.output) / "profile" / "trace-rank-0.json").read_text())
    steps = [event for event in trace["traceEvents"] if "AdamW.step" in event.get("name", "")]
    assert len(steps) == 2


class OtherTexts(World):
    """Rank 0 of two; the other rank could not read one of the texts."""

    def sum_integers(self, values):
        *counts, num_failed, num_samples, num_slots = values
        return [*(2 * count for count in counts), num_failed, 2 * num_samples - 1, 2 * num_slots - 20]


def test_ranks_that_read_different_texts_stop():
    step = Step([], LoaderState(0, 1), 0.1, 10, 200, 0, ())
    steps = agreed_steps(iter([step]), OtherTexts(0, 2, torch.device("cpu")), lambda batch: 0)
    with pytest.raises(
        CollectiveError, match="must read the same texts, got 10 of 19 samples and 200 of 380 tokens on this rank"
    ):
        next(steps)


def test_an_output_that_is_a_file_is_refused_before_anything_slow(config):
    run = config()
    Path(run.output).write_text("mine")
    run.model.base = "nowhere"
    with pytest.raises(ValueError, match="output must be a folder, got the file"):
        Trainer(run)
