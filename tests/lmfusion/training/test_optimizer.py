"""Learning rate, weight decay, the optimizer's state on any number of ranks, and the running average of the weights."""

import sys
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lmfusion.training.checkpoint import CheckpointWriter, checkpoint_path, load_checkpoint, ranges, slice_of
from lmfusion.training.config import TrainConfig
from lmfusion.training.distributed import World, local_shard
from lmfusion.training.ema import EMA
from lmfusion.training.optimizer import Optimizer, clip_gradients, has_decay, learning_rate, state_block
from lmfusion.training.trainer import Trainer

SHAPES = {
    "image.wide.weight": (6, 768),
    "image.odd.weight": (30, 192),
    "image.small.weight": (4, 256),
    "image.conv.weight": (50, 10, 3, 3),
    "image.norm.weight": (5,),
    "text.wide.weight": (5, 1024),
}


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


def train_config(**changes):
    values = {"num_steps": 10, "warmup_steps": 0, "learning_rate": 0.1, "min_learning_rate": 0.1}
    return TrainConfig(**{**values, **changes})


def optimizer_of(weights, config, kind="adamw"):
    return Optimizer(weights, config, kind, text_ratio=0.5)


def values(seed):
    torch.manual_seed(seed)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


@contextmanager
def rank_of(rank, size):
    """As one of several ranks, without the others. Yields a function that shards tensors by rows as FSDP2 does."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        mesh = init_device_mesh("cpu", (size,))
        yield lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)
    finally:
        dist.destroy_process_group()


def move(optimizer, weights, shard, steps, skip=None):
    for step in steps:
        for name, gradient in values(100 + step).items():
            weights[name].grad = shard(gradient)
        optimizer.step(step, skip)


@pytest.fixture
def uncompiled(monkeypatch):
    """torchao compiles its update again for each shape, which takes seconds; the numbers do not depend on it here."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def save_alone(folder, parts):
    writer = CheckpointWriter(folder, 1, World(0, 1, torch.device("cpu")))
    writer.save(3, parts, {})
    writer.finish()
    return checkpoint_path(folder, 3)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_any_number_of_ranks_goes_on(tmp_path, uncompiled, kind, size):
    """The state they start from is the same to the bit. Updates may differ in the last bits, by the kernel used."""
    config = train_config()
    weights = {name: torch.nn.Parameter(value) for name, value in values(0).items()}
    alone = optimizer_of(weights, config, kind)

    def all_of(optimizer, weights):
        return optimizer.state_tensors() | {f"weights/{name}": slice_of(weight) for name, weight in weights.items()}

    move(alone, weights, torch.Tensor.clone, range(3))
    path = save_alone(tmp_path, {"weights": weights, "optimizer": alone.state_tensors()})
    before = {name: held.rows.clone() for name, held in all_of(alone, weights).items()}
    move(alone, weights, torch.Tensor.clone, range(3, 4))
    after = {name: held.rows for name, held in all_of(alone, weights).items()}

    def compare(expected, found, **tolerance):
        for name, (rows, (first, end, num_rows)) in found.items():
            whole = expected[name].reshape(num_rows, *expected[name].shape[1:])
            rows = rows.reshape(end - first, *whole.shape[1:])
            torch.testing.assert_close(
                rows, whole[first:end], msg=lambda text, name=name: f"{name}: {text}", **tolerance
            )

    for rank in range(size):
        with rank_of(rank, size) as shard:
            here = {name: torch.nn.Parameter(shard(value)) for name, value in values(1).items()}
            optimizer = optimizer_of(here, config, kind)
            parts, _ = load_checkpoint(path, ranges({"weights": here, "optimizer": optimizer.state_tensors()}))
            optimizer.load_state_tensors(parts["optimizer"])
            for name, weight in here.items():
                local_shard(weight.detach()).copy_(parts["weights"][name])
            compare(before, all_of(optimizer, here), rtol=0, atol=0)
            move(optimizer, here, shard, range(3, 4))
            compare(after, all_of(optimizer, here), rtol=1e-6, atol=1e-7)


def test_8bit_state_is_plain_and_small(uncompiled):
    weights = {name: torch.nn.Parameter(value) for name, value in values(0).items()}
    optimizer = optimizer_of(weights, train_config(), "adamw_8bit")
    move(optimizer, weights, torch.Tensor.clone, range(2))
    state = {name: held.rows for name, held in optimizer.state_tensors().items()}
    assert {type(tensor) for tensor in state.values()} == {torch.Tensor}
    assert state["exp_avg.codes/image.wide.weight"].dtype == torch.uint8
    assert state["exp_avg.codes/image.wide.weight"].unique().numel() > 100
    assert state["exp_avg_sq.scale/image.wide.weight"].shape == (6 * 768 // 256,)
    assert state["exp_avg.scale/image.odd.weight"].shape == (30 * 192 // 64,)
    for name in ("small", "conv", "norm"):
        assert state[f"exp_avg_sq/image.{name}.weight"].dtype == torch.float32
    assert state["step/image.wide.weight"].item() == 2
    assert not optimizer.can_skip
    assert [state_block(torch.Size(shape)) for shape in SHAPES.values()] == [256, 64, 0, 0, 0, 256]


def test_8bit_updates_are_close_to_those_of_full_moments(uncompiled):
    moved = {}
    for kind in ("adamw", "adamw_8bit"):
        weights = {name: torch.nn.Parameter(value) for name, value in values(0).items()}
        optimizer = optimizer_of(weights, train_config(weight_decay=0.0), kind)
        move(optimizer, weights, torch.Tensor.clone, range(10))
        moved[kind] = {name: weights[name].detach() - value for name, value in values(0).items()}
    for name, expected in moved["adamw"].items():
        difference = (moved["adamw_8bit"][name] - expected).norm() / expected.norm()
        assert difference < (0.05 if state_block(expected.shape) else 1e-5), name


@pytest.mark.slow
def test_8bit_resumes_to_the_bit_as_it_runs(tmp_path):
    """With the update compiled, as in a run."""
    name = "image.wide.weight"
    config = train_config()

    def update(optimizer, weight, steps):
        for step in steps:
            weight.grad = values(100 + step)[name]
            optimizer.step(step)

    whole, broken = (torch.nn.Parameter(values(0)[name]) for _ in range(2))
    unbroken = optimizer_of({name: whole}, config, "adamw_8bit")
    update(unbroken, whole, range(4))
    optimizer = optimizer_of({name: broken}, config, "adamw_8bit")
    update(optimizer, broken, range(2))
    path = save_alone(tmp_path, {"optimizer": optimizer.state_tensors()})
    again = optimizer_of({name: broken}, config, "adamw_8bit")
    again.load_state_tensors(load_checkpoint(path)[0]["optimizer"])
    update(again, broken, range(2, 4))
    assert torch.equal(whole, broken)
    for name, held in unbroken.state_tensors().items():
        assert torch.equal(held.rows, again.state_tensors()[name].rows), name


def test_missing_torchao_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    weights = {"image.a": torch.nn.Parameter(torch.ones(3))}
    with pytest.raises(ValueError, match="adamw_8bit needs torchao, which is not installed; pip install torchao"):
        optimizer_of(weights, train_config(), "adamw_8bit")
    with pytest.raises(ValueError, match="no weights to train"):
        optimizer_of({}, train_config())


def test_skipped_steps_change_nothing():
    """With the flag at 1 neither weights nor moments nor counts change; with 0 the step is an ordinary one."""
    plain = {name: torch.nn.Parameter(value) for name, value in values(0).items()}
    skipping = {name: torch.nn.Parameter(value) for name, value in values(0).items()}
    one, other = optimizer_of(plain, train_config()), optimizer_of(skipping, train_config())
    averages, skipping_averages = EMA(plain, 0.9), EMA(skipping, 0.9)
    assert one.can_skip
    move(one, plain, torch.Tensor.clone, range(2))
    averages.update(1)
    move(other, skipping, torch.Tensor.clone, range(2), skip=torch.tensor(0.0))
    skipping_averages.update(1, torch.tensor(0.0))
    for weight in skipping.values():
        weight.grad = torch.full_like(weight, float("nan"))
    other.step(2, torch.tensor(1.0))
    skipping_averages.update(2, torch.tensor(1.0))
    assert all(weight.grad is None for weight in skipping.values())
    for name, weight in plain.items():
        assert torch.equal(weight, skipping[name]), name
        torch.testing.assert_close(
            averages.state_tensors()[name].rows, skipping_averages.state_tensors()[name].rows, rtol=1e-6, atol=1e-6
        )
    for name, held in one.state_tensors().items():
        assert torch.equal(held.rows, other.state_tensors()[name].rows), name


def test_gradients_are_clipped_to_a_norm_over_all_ranks():
    class TwoAlike(World):
        def sum_tensor(self, x):
            return x.mul_(2)

    weights = {name: torch.nn.Parameter(value) for name, value in values(0).items()}
    for name, gradient in values(1).items():
        weights[name].grad = gradient.clone()
    norm = torch.cat([gradient.flatten() for gradient in values(1).values()]).norm()
    torch.testing.assert_close(clip_gradients(weights.values(), 1e9), norm)
    assert all(torch.equal(weights[name].grad, gradient) for name, gradient in values(1).items())
    total = clip_gradients(weights.values(), 0.5, TwoAlike(0, 2, torch.device("cpu")))
    torch.testing.assert_close(total, norm * 2**0.5)
    for name, gradient in values(1).items():
        torch.testing.assert_close(weights[name].grad, gradient * (0.5 / total))


def test_ema():
    weights = {"a": torch.nn.Parameter(torch.zeros(2))}
    ema = EMA(weights, decay=0.9)

    def average():
        return ema.state_tensors()["a"].rows.tolist()

    weights["a"].data.fill_(1.0)
    ema.update(step=10**6)
    assert average() == pytest.approx([0.1, 0.1])
    with ema.applied():
        assert weights["a"].tolist() == pytest.approx([0.1, 0.1])
    assert weights["a"].tolist() == [1.0, 1.0] and average() == pytest.approx([0.1, 0.1])
    ema.update(step=0)  # early on, most of the average is replaced
    assert average() == pytest.approx([0.91, 0.91])
