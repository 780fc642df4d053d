"""The kernels of torch.ops.lmfusion.hybrid_attention: Triton's registration on CUDA, and C++ for all queries."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lmfusion_kernels as lk
import lmfusion_kernels.triton
from lmfusion_kernels.attention import dispatch, torch_ops
from lmfusion_kernels.attention.interface import AttentionCall
from lmfusion_kernels.runtime import library

pytestmark = pytest.mark.skipif(not library.native, reason="the native ops were not compiled")

ROOT = Path(__file__).resolve().parents[3]
spans = st.tuples(st.sampled_from(["text", "image", "marker"]), st.integers(1, 12))
documents = st.lists(st.lists(spans, min_size=1, max_size=5), min_size=1, max_size=5)


def test_the_ops_have_an_implementation_on_cuda():
    for op in ("hybrid_attention", "hybrid_attention_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lmfusion::{op}", "CUDA")


def test_it_hands_everything_to_triton(monkeypatch):
    calls = []
    module = types.SimpleNamespace(
        forward=lambda *arguments: calls.append(arguments) or "out and lse",
        backward=lambda *arguments: calls.append(arguments) or "gradients",
    )
    monkeypatch.setattr(lmfusion_kernels.triton, "hybrid_attention", module, raising=False)
    assert torch_ops._forward(*range(7)) == "out and lse"
    assert torch_ops._backward(*range(13)) == "gradients"
    assert calls == [tuple(range(7)), tuple(range(13))]


def test_triton_is_not_touched_on_the_cpu():
    code = """
import sys, torch
import lmfusion_kernels as lk
layout = lk.TokenLayout.from_spans([[("text", 3), ("image", 4)]])
x = torch.randn(7, 2, 16, requires_grad=True)
lk.hybrid_attention(x, x, x, layout).sum().backward()
print(*(name for name in sys.modules if name.startswith("lmfusion_kernels.triton.")))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == []


@given(documents, st.booleans(), st.integers(0, 99))
def test_native_equals_the_specification_for_all_rows(documents, frozen_text, seed):
    layout = lk.TokenLayout.from_spans(documents, frozen_text=frozen_text)
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, layout.num_tokens, 1, 16, generator=generator)
    for rows, n in (("all", layout.num_tokens), ("active", layout.num_active), ("constant", layout.num_constant)):
        q, dout = torch.randn(2, n, 2, 16, generator=generator)
        out, lse = dispatch.forward("native", AttentionCall(q, k, v, layout, rows, 0.25))
        expected_out, expected_lse = dispatch.forward("reference", AttentionCall(q, k, v, layout, rows, 0.25))
        torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
        if rows == "constant":
            with pytest.raises(ValueError, match="constant tokens have no backward"):
                dispatch.backward("native", AttentionCall(q, k, v, layout, rows, 0.25), dout, out, lse)
            continue
        grads = dispatch.backward("native", AttentionCall(q, k, v, layout, rows, 0.25), dout, out, lse)
        expected = dispatch.backward("reference", AttentionCall(q, k, v, layout, rows, 0.25), dout, out, lse)
        for grad, target in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, target, rtol=1e-4, atol=1e-5)


def test_a_negative_scale():
    layout = lk.TokenLayout.from_spans([[("text", 3), ("image", 4)]])
    q, k, v, dout = torch.randn(4, 7, 2, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for kernel in ("native", "reference"):
        out, lse = dispatch.forward(kernel, AttentionCall(q, k, v, layout, "all", -0.4))
        results.append(
            [out, lse, *dispatch.backward(kernel, AttentionCall(q, k, v, layout, "all", -0.4), dout, out, lse)]
        )
    expected = torch.einsum("nhd,mhd->hnm", q, k) * -0.4
    expected = expected.masked_fill(~lk.reference.hybrid_mask(layout), float("-inf")).logsumexp(-1)
    for value, target in zip(*results, strict=True):
        torch.testing.assert_close(value, target, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0][1], expected)
