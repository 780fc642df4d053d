"""Learning rate, weight decay, the optimiser's state, and the running average of the weights."""

import pytest
import torch

from lmfusion.training.config import TrainConfig
from lmfusion.training.ema import EMA
from lmfusion.training.optimizer import Optimizer, has_decay, learning_rate
from lmfusion.training.trainer import Trainer


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
