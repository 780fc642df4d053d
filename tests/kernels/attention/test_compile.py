"""torch.compile(fullgraph=True) takes attention by PyTorch's flash kernels, in one graph for many layouts, without host
syncs.

The two private ops of torch get an implementation on the CPU, in plain PyTorch, during a test.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import lmfusion_kernels as lk
from lmfusion_kernels import reference
from lmfusion_kernels.attention import dispatch, flash, table
from lmfusion_kernels.attention.interface import AttentionCall
from lmfusion_kernels.attention.packed_causal import Sequences
from lmfusion_kernels.runtime import device as device_module
from lmfusion_kernels.runtime import library
from tests.kernels.attention.packed_causal import PlainPackedCausal


@pytest.fixture
def flash_on_the_cpu(monkeypatch):
    plain = PlainPackedCausal()
    library = torch.library.Library("aten", "IMPL")

    def forward(q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, scale=None, seqused_k=None, **more):
        out, lse = plain.forward(q, k, v, Sequences(cum_q, cum_k, max_q, max_k, seqused_k), scale)
        return out, lse, torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64), q.new_empty(0)

    def backward(dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, seed, unused, *, scale, **more):
        return plain.backward(dout, q, k, v, out, lse, Sequences(cum_q, cum_k, max_q, max_k), scale)

    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    monkeypatch.setattr(flash.TorchFlash, "unavailable_reason", lambda self, device: "")
    monkeypatch.setattr(flash.TorchFlash, "unsupported_reason", lambda self, case: "")
    dispatch._cached_unavailable_reason.cache_clear()
    yield
    library._destroy()
    dispatch._cached_unavailable_reason.cache_clear()


def run(op, layout, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = op(*leaves, layout)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def by_flash(q, k, v, layout):
    return lk.hybrid_attention(2 * q, k, v, layout, backend="flash")


@pytest.mark.usefixtures("flash_on_the_cpu")
def test_one_graph_for_many_layouts():
    torch.manual_seed(0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(by_flash, fullgraph=True, backend=counter)
    for num_text in (3, 5, 8, 13):
        layout = lk.TokenLayout.from_spans([[("text", num_text), ("image", 2 * num_text)], [("image", 4)]] * 2)
        inputs = [torch.randn(layout.num_tokens, heads, 8) for heads in (4, 2, 2)]
        expected = run(lambda q, k, v, layout: reference.hybrid_attention(2 * q, k, v, layout), layout, inputs)
        for value, target in zip(run(compiled, layout, inputs), expected, strict=True):
            torch.testing.assert_close(value, target, rtol=1e-3, atol=1e-4)
    assert counter.frame_count <= 2  # one for the first numbers, one for all others


@pytest.mark.usefixtures("flash_on_the_cpu")
def test_the_block_compiles_with_flash_attention():
    torch.manual_seed(0)
    block = lk.RoutedBlock(32, 48, 4, 2, frozen_text=True)
    layout = lk.TokenLayout.from_spans([[("text", 4), ("image", 6), ("text", 2)], [("text", 3), ("image", 5)]])
    x = [torch.randn(n, 32, requires_grad=True) for n in (layout.num_text, layout.num_image)]
    rope = lk.rope_tables(layout.position, 1e4 ** -torch.linspace(0, 1, 4))
    results = []
    weights = block.text.weights(torch.float32), block.image.weights(torch.float32)
    for backend in ("flash", "reference"):

        def call(x_text, x_image, backend=backend):
            return lk.routed_block((x_text, x_image), layout, *weights, rope, backend=backend)

        y_text, y_image = torch.compile(call, fullgraph=True, backend="aot_eager")(*x)
        loss = y_text[layout.num_constant :].square().sum() + y_image.square().sum()
        results.append([y_text, y_image, *torch.autograd.grad(loss, x)])
    for value, target in zip(*results, strict=True):
        torch.testing.assert_close(value, target, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("is_measured", [False, True])
def test_the_choice_is_made_while_tracing(monkeypatch, is_measured):
    """On a simulated GPU: by the table, by the default order, by what is installed."""
    rows = (table.TableRow("9.0", "bfloat16", 64, "training", 5, "flash"),) if is_measured else ()
    monkeypatch.setattr(table, "load", lambda: rows)
    monkeypatch.setattr(device_module, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(library, "unavailable_reason", "")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    for cache in (table.measured, dispatch._cached_unavailable_reason):
        cache.cache_clear()
    layout = lk.TokenLayout.from_spans([[("text", 9)]])

    def name_of(backend):
        kind = dict(dtype=torch.bfloat16, num_heads=4, num_kv_heads=2, head_dim=64, needs_grad=True)
        return dispatch.choose_kernel(backend, layout, device=torch.device("cuda"), **kind)

    def with_its_length(x, backend):
        return x + len(name_of(backend))

    torch._dynamo.reset()  # what the other case compiled holds its choice as a constant
    compiled = torch.compile(with_its_length, fullgraph=True, backend="eager")
    for backend in (None, "native", "flash"):
        assert compiled(torch.zeros(1), backend) == len(name_of(backend))
    assert name_of(None) == ("flash" if is_measured else "triton")
    for cache in (table.measured, dispatch._cached_unavailable_reason):
        cache.cache_clear()


def test_tracing_asks_the_device_for_nothing():
    """Meta tensors hold no numbers, so reading one on the host would fail. Forward and backward, all queries."""
    layout = lk.TokenLayout.from_spans([[("text", 4), ("image", 6), ("text", 2)], [("text", 3), ("image", 5)]])
    moved = layout.to("meta")
    for name in ("flash", "flash-attn-4"):
        kernel = dispatch.KERNELS[name]
        for rows, n in (("all", 20), ("active", 13), ("constant", 7)):
            q, k = (torch.empty(*size, 64, dtype=torch.bfloat16, device="meta") for size in ((n, 4), (20, 2)))
            out, lse = kernel.forward(AttentionCall(q, k, k, moved, rows, 1.0))
            assert (out.shape, lse.shape, lse.dtype) == (q.shape, (4, n), torch.float32)
            if rows != "constant":
                dq, dk, dv = kernel.backward(AttentionCall(q, k, k, moved, rows, 1.0), out, out, lse)
                assert (dq.shape, dk.shape, dv.shape) == (q.shape, (n, 2, 64), (n, 2, 64))
