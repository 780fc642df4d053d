"""The kernels behind torch.ops.lmfusion.hybrid_attention: C++ on the CPU ("native"), Triton on the GPU ("triton").

csrc/cpu/hybrid_attention_op.cpp registers the first one. The second is registered here, and imports Triton when it is
first called: a Triton kernel is compiled for the device it runs on, so nothing has to be built in advance.
"""

from typing import Any

import torch
from torch import Tensor

from lmfusion_kernels.attention.availability import has_module, unsupported_device
from lmfusion_kernels.attention.interface import AttentionCall, AttentionProblem, Gradients, dtype_name
from lmfusion_kernels.runtime import library

_ops = torch.ops.lmfusion


class _TorchOp:
    """The op, which the dispatcher routes by device."""

    is_differentiable = True

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        return _ops.hybrid_attention(call.q, call.k, call.v, *call.key_ranges(), call.scale, *call.hidden_ends())

    def backward(self, call: AttentionCall, dout: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        key_start, key_end, out_row = call.key_ranges()
        by_key = call.query_ranges()
        return _ops.hybrid_attention_backward(
            dout, call.q, call.k, call.v, out, lse, key_start, key_end, *by_key, out_row, call.scale,
            *call.hidden_ends(),
        )  # fmt: skip


class Native(_TorchOp):
    """C++ on the CPU: float32 and bfloat16, every head size, with and without a cache."""

    summary = "C++, CPU only"

    def unavailable_reason(self, device: torch.device) -> str:
        if device.type not in ("cpu", "meta"):
            return f"it runs on the CPU, not on {device.type}"
        return library.unavailable_reason

    def unsupported_reason(self, problem: AttentionProblem) -> str:
        if problem.dtype not in (torch.float32, torch.bfloat16):
            return f"it takes float32 and bfloat16, not {dtype_name(problem.dtype)}"
        return ""


class Triton(_TorchOp):
    """Triton on CUDA: float32, bfloat16, float16; head sizes that are multiples of 8 up to 256; every layout."""

    summary = "Triton, straight from the layout's vectors"

    def unavailable_reason(self, device: torch.device) -> str:
        if reason := library.unavailable_reason or unsupported_device(device, "8.0 or later", ((8, 99),)):
            return reason
        return "" if has_module("triton") else "triton is not installed; `pip install triton`"

    def unsupported_reason(self, problem: AttentionProblem) -> str:
        if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it takes float32, bfloat16 and float16, not {dtype_name(problem.dtype)}"
        if problem.head_dim % 8 or not 0 < problem.head_dim <= 256:
            return f"it takes head sizes that are multiples of 8 up to 256, not {problem.head_dim}"
        return ""


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from lmfusion_kernels.triton import hybrid_attention

    return hybrid_attention.forward(*arguments)


def _backward(*arguments: Any) -> Gradients:
    from lmfusion_kernels.triton import hybrid_attention

    return hybrid_attention.backward(*arguments)


if library.native:
    _library_of_triton = torch.library.Library("lmfusion", "IMPL")
    _library_of_triton.impl("hybrid_attention", _forward, "CUDA")
    _library_of_triton.impl("hybrid_attention_backward", _backward, "CUDA")
