"""The benchmark of a training step times a real step, and the same one each time."""

import pytest
import torch

from benchmarks.cases import test_training_step as benchmark
from benchmarks.harness import shapes


@pytest.fixture
def case(monkeypatch):
    monkeypatch.setattr(benchmark, "VOCABULARY", 300)
    monkeypatch.setattr(benchmark, "ROW_TOKENS", 600)
    benchmark.make_case.cache_clear()
    yield benchmark.make_case(shapes.TINY, torch.float32, torch.device("cpu"))
    benchmark.make_case.cache_clear()


def test_every_step_computes_the_same_and_moves_nothing(case):
    before = {name: weight.detach().clone() for name, weight in case.model.named_parameters()}
    results = [benchmark.contestant(case, mode).prepare(0)() for mode in ("none", "ffn", "layer", "none")]
    for loss, norm in results:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-5, atol=0)
        torch.testing.assert_close(norm, results[0][1], rtol=1e-4, atol=0)
    for name, weight in case.model.named_parameters():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-20, msg=name)


def test_gradients_reach_all_that_is_trained(case):
    case.model(batch=case.batch).loss.backward()
    silent = [name for name, weight in case.optimizer.weights.items() if not weight.grad.abs().sum() > 0]
    assert not silent
    assert case.flops > 2 * 3 * case.batch.layout.num_image * 2 * shapes.TINY.num_parameters
