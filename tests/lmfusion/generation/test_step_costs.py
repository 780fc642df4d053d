"""Steps never read a tensor's numbers on the host, and launch a dozen ops per layer."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness.counting import ALLOCATIONS, is_view, waits_for_device
from lmfusion.generation.graphs import ReplayedStep
from tests.lmfusion.generation.replays import STEPS, make_cache, make_model

OF_LAYER = {
    "lmfusion::rms_norm": 2,
    "lmfusion::rope_reorder_cached": 1,
    "lmfusion::hybrid_attention": 1,
    "lmfusion::swiglu": 1,
    "aten::mm": 6,
    "aten::addmm": 2,
}
"""Ops of one layer. The products of a tower without tokens are called, too, and launch nothing."""


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


class Launches(TorchDispatchMode):
    """Counts the ops that would launch something on a GPU, and those that would wait for it."""

    def __init__(self):
        super().__init__()
        self.ops, self.waits = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if not is_view(function) and name not in ALLOCATIONS:
            self.ops[name] += 1
            self.waits[name] += waits_for_device(function, args)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", STEPS)
def test_ops_of_a_step(tiny_llama, name):
    model = make_model(tiny_llama)
    cache, (step, make_calls) = make_cache(model), STEPS[name]
    with Launches() as launches:
        step(model, cache, *make_calls()[0].arguments)
    assert launches.waits.total() == 0, launches.waits
    num_layers = len(cache.layers)
    for op, count in OF_LAYER.items():
        if op.startswith("aten"):  # heads and patch coder have products, too
            assert num_layers * count <= launches.ops[op] <= num_layers * count + 6, (op, launches.ops)
        else:
            assert launches.ops[op] == num_layers * count, (op, launches.ops)
    assert launches.ops["lmfusion::rms_norm_alone"] == 1, launches.ops  # the final norm


@pytest.mark.parametrize("name", STEPS)
def test_no_step_reads_what_a_tensor_holds(tiny_llama, name):
    """Tensors of the device "meta" have no content: copying them to the host, or reading a number, fails."""
    model = make_model(tiny_llama).to("meta")
    cache, (step, make_calls) = make_cache(model), STEPS[name]
    run = ReplayedStep(lambda *arguments: step(model, cache, *arguments), torch.device("meta"), None)
    result = run(*make_calls()[0].arguments)
    assert all(tensor.is_meta for tensor in (result if isinstance(result, tuple) else (result,)))
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(1, device="meta").item()
