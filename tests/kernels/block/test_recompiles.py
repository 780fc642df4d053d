"""torch.compile makes few graphs for a stream of batches, whatever number of tokens a tower has."""

import itertools
import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import lmfusion_kernels as lk
from tests.kernels.block.test_routed_block import make_block, make_inputs
from tests.kernels.ops.row_ops import needs_native

pytestmark = [needs_native, pytest.mark.slow]

LIMIT = torch._dynamo.config.recompile_limit
COUNTS = (0, 1, 7)


def document(num_constant, num_live, num_image):
    """A document with these numbers of tokens of each class, under a frozen text tower."""
    spans = [("text", num_constant), ("image", num_image), ("marker" if not num_image else "text", num_live)]
    return [[span for span in spans if span[1]]] if num_constant + num_live + num_image else []


STREAMS = {
    "every class": [document(*counts) for counts in itertools.product(COUNTS, repeat=3)],
    "text alone": [document(n, 0, 0) for n in (5, 0, 1, 2, 9)],
    "images alone": [document(0, 0, n) for n in (5, 0, 1, 2, 9)],
    "one live token": [document(n, 1, n) for n in (5, 9, 1, 0, 3)],
    "many documents": [
        [[("text", n), ("image", 4)]] * repeats + [[("text", 3)]] * (n % 3)
        for n, repeats in itertools.product((1, 5, 8), (0, 1, 3))
    ],
    "hidden spans": [
        [[("text", n), ("image", 4, "hidden"), ("image", 4)]] * repeats + [[("image", n)]]
        for n, repeats in itertools.product((1, 5, 8), (0, 1, 3))
    ],
}


def stacked(blocks, order):
    def model(x, layout, rope):
        for block in blocks:
            x = block(x, layout, rope, order=order)
        return x

    return model


def outcome(model, x, layout, rope, trained):
    """The result and, if trained, the gradients of the rows that are not constant, or of all of a pair."""
    rows = x if isinstance(x, tuple) else (x,)
    rows = tuple(part.detach().clone().requires_grad_(trained) for part in rows)
    with torch.set_grad_enabled(trained):
        y = model(rows if isinstance(x, tuple) else rows[0], layout, rope)
    parts = y if isinstance(y, tuple) else (y,)
    grads = torch.autograd.grad(sum(part.square().sum() for part in parts), rows) if trained else ()
    return [*(part.detach() for part in parts), *grads]


def count_graphs(model, stream, trained, paired=False):
    """The number of graphs that torch.compile makes. Every result must equal the uncompiled one."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for documents in stream:
        layout = lk.TokenLayout.from_spans(documents)
        x, rope = make_inputs(layout, torch.float32, paired=paired)
        expected = outcome(model, x, layout, rope, trained)
        for value, target in zip(outcome(compiled, x, layout, rope, trained), expected, strict=True):
            assert torch.equal(value, target), documents
    return counter.frame_count


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "inference"])
@pytest.mark.parametrize(("num_blocks", "order"), [(1, "tower"), (2, "sequence")])
@pytest.mark.parametrize("name", STREAMS)
def test_graphs_for_a_stream(name, num_blocks, order, trained):
    """One for the first sizes; once they vary, a few more for many rows, none, and one."""
    model = stacked([make_block() for _ in range(num_blocks)], order)
    assert count_graphs(model, STREAMS[name], trained) <= 6


@pytest.mark.parametrize("seed", range(2))
def test_graphs_in_any_order(seed):
    stream = [documents for stream in STREAMS.values() for documents in stream]
    random.Random(seed).shuffle(stream)
    assert count_graphs(stacked([make_block()], "sequence"), stream[:30], trained=True) <= 6


@pytest.mark.parametrize(("recompute", "qk_norm"), [("ffn", True), ("layer", False)])
def test_graphs_for_recomputing_and_norms(recompute, qk_norm):
    block = make_block(qk_norm=qk_norm, qkv_bias=True)
    model = lambda x, layout, rope: block(x, layout, rope, recompute=recompute)  # noqa: E731
    assert count_graphs(model, STREAMS["every class"][::3], trained=True) <= 6


def test_graphs_for_pairs_of_towers():
    """The towers' numbers of rows are sizes of the arguments here: each is zero, one, or more."""
    model = stacked([make_block(image_width=16)], "tower")
    stream = [document(a, b, c) for a, b, c in ((5, 2, 4), (7, 3, 6), (8, 0, 0), (0, 0, 9), (4, 2, 1), (1, 0, 8))]
    count = 0
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for documents in stream * 2:
        layout = lk.TokenLayout.from_spans(documents)
        x, rope = make_inputs(layout, torch.float32, 16)
        expected = outcome(model, x, layout, rope, True)
        assert all(map(torch.equal, outcome(compiled, x, layout, rope, True), expected))
        count = counter.frame_count
    assert count <= LIMIT - 1
