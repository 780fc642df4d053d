"""The choice of the kernel for gate, up and SwiGLU, its errors, and the call of QuACK."""

import sys
from types import ModuleType

import pytest
import torch

import lmfusion_kernels as lk
from lmfusion_kernels import reference
from lmfusion_kernels.ops import gate_up_swiglu as ffn
from tests.kernels.block.test_routed_block import DOCUMENTS, make_block, make_inputs, run
from tests.kernels.ops.row_ops import needs_native, random

X = [torch.empty(4, 32), torch.empty(3, 32)]
WEIGHTS = [torch.empty(96, 32), torch.empty(80, 32)]


def test_two_calls_are_the_default(monkeypatch):
    monkeypatch.delenv("LMFUSION_KERNELS_FFN", raising=False)
    assert ffn.choose_ffn(X, WEIGHTS, keep=True) == "two-calls"
    monkeypatch.setenv("LMFUSION_KERNELS_FFN", "two-calls")
    assert ffn.choose_ffn(X, WEIGHTS, keep=True) == "two-calls"


def test_unknown_kernels_are_named(monkeypatch):
    monkeypatch.setenv("LMFUSION_KERNELS_FFN", "cutlass")
    with pytest.raises(ValueError, match="LMFUSION_KERNELS_FFN='cutlass' is unknown; known: two-calls, triton, quack"):
        ffn.choose_ffn(X, WEIGHTS, keep=True)


@needs_native
def test_the_block_says_why_a_kernel_cannot_run(monkeypatch):
    block = make_block()
    layout = lk.TokenLayout.from_spans(DOCUMENTS)
    x, rope = make_inputs(layout, torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("LMFUSION_KERNELS_FFN", "triton")
    with pytest.raises(ValueError, match=r"triton was asked for, but .*; two-calls runs everywhere"):
        block(x, layout, rope, backend="native")


@pytest.mark.parametrize("kernel", ["triton", "quack"])
def test_reasons(monkeypatch, kernel):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(ffn.importlib.util, "find_spec", lambda name: None)
    assert "is not installed; `pip install" in ffn._unavailable_reason(kernel, torch.device("cuda"))
    monkeypatch.setattr(ffn.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(ffn.importlib.metadata, "version", lambda name: "0.6.5")
    assert ffn._unavailable_reason(kernel, torch.device("cpu")) == "it runs on CUDA devices, not on cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert ffn._unavailable_reason(kernel, torch.device("cuda")) == "it needs compute capability 9.0, not 8.9"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert ffn._unavailable_reason(kernel, torch.device("cuda")) == ""


@pytest.mark.parametrize(
    ("kernel", "dtype", "width", "ffn_width", "keep", "reason"),
    [
        ("triton", torch.float32, 32, 48, True, "it takes bfloat16 and float16, not float32"),
        ("triton", torch.bfloat16, 36, 48, True, r"widths in multiples of 8, and gate_up_proj is \(96, 36\)"),
        ("triton", torch.bfloat16, 32, 44, True, r"widths in multiples of 8, and gate_up_proj is \(88, 32\)"),
        ("quack", torch.bfloat16, 32, 48, True, "interleaved, .* a block with recompute='ffn' keeps none"),
    ],
)
def test_what_the_kernels_take(monkeypatch, kernel, dtype, width, ffn_width, keep, reason):
    monkeypatch.setattr(ffn, "_unavailable_reason", lambda kernel, device: "")
    monkeypatch.setenv("LMFUSION_KERNELS_FFN", kernel)

    class OnCuda(torch.Tensor):
        device = torch.device("cuda")

    def choose(dtype, width, ffn_width, keep):
        x = torch.empty(3, width, dtype=dtype).as_subclass(OnCuda)
        return ffn.choose_ffn([x, x], [torch.empty(2 * ffn_width, width)] * 2, keep)

    with pytest.raises(ValueError, match=reason):
        choose(dtype, width, ffn_width, keep)
    assert choose(torch.bfloat16, 32, 48, keep=False) == kernel


def fake_quack(calls):
    """`quack.gemm_interface` as far as it is called, with the meaning it documents."""
    module = ModuleType("quack.gemm_interface")

    def gemm_gated(A, B, *, activation, store_preact, tuned, concat_layout):
        calls.append((activation, store_preact, tuned, concat_layout))
        assert B.shape[0] == A.shape[1] and B.stride() == (1, B.shape[0])  # [K, N], K contiguous: no copy was made
        return None, reference.swiglu(A @ B)

    module.gemm_gated = gemm_gated
    return {"quack": ModuleType("quack"), "quack.gemm_interface": module}


@needs_native
def test_quack_is_called_with_the_weight_as_it_is(monkeypatch):
    calls = []
    for name, module in fake_quack(calls).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(ffn, "_unavailable_reason", lambda kernel, device: "")
    block = make_block()
    layout = lk.TokenLayout.from_spans(DOCUMENTS)
    x, rope = make_inputs(layout, torch.float32)
    expected = run(block, x, layout, rope, "native")
    monkeypatch.setenv("LMFUSION_KERNELS_FFN", "quack")
    with pytest.raises(ValueError, match="interleaved"):
        block(x, layout, rope, backend="native")
    for name, value in run(block, x, layout, rope, "native", recompute="ffn").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    assert calls == [("swiglu", False, False, ("B",))] * 2


@pytest.mark.parametrize("kernel", ["triton", "quack"])
@pytest.mark.parametrize("num_constant", [0, 3])
def test_shapes_under_tracing(kernel, num_constant):
    keep = kernel == "triton"
    x, weights = [random(5, 32), random(4, 24)], [random(96, 32), random(80, 24)]
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (*x, *weights)]
        results = torch.ops.lmfusion.gate_up_swiglu(*fakes, num_constant, keep, kernel)
    expected = ffn.gate_up_swiglu("two-calls", x, weights, num_constant, keep)
    assert [t.shape for t in results] == [t.shape for part in expected for t in part]
