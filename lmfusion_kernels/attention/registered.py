"""The kernels behind torch.ops.lmfusion.hybrid_attention: C++ on the CPU ("native"), Triton on the GPU ("triton").

csrc/cpu/hybrid_attention_op.cpp registers the first one. The second is registered here, and Triton is imported when it is
first called: a Triton kernel is compiled for the device it runs on, so nothing of it need be there before.
"""

from typing import Any

import torch
from torch import Tensor

from lmfusion_kernels.attention.installed import has_module, why_not_device
from lmfusion_kernels.attention.interface import (
    AttentionProblem,
    QueryRows,
    dtype_name,
    hidden_ends,
    key_ranges,
    query_ranges,
)
from lmfusion_kernels.layout.token_layout import TokenLayout
from lmfusion_kernels.runtime import library

_ops = torch.ops.lmfusion


class _Registered:
    is_differentiable = True

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, rows: QueryRows, scale: float
    ) -> tuple[Tensor, Tensor]:
        return _ops.hybrid_attention(q, k, v, *key_ranges(layout, rows), scale, *hidden_ends(layout, rows))

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        layout: TokenLayout,
        rows: QueryRows,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        key_start, key_end, out_row = key_ranges(layout, rows)
        by_key = query_ranges(layout, rows)
        return _ops.hybrid_attention_backward(
            dout, q, k, v, out, lse, key_start, key_end, *by_key, out_row, scale, *hidden_ends(layout, rows)
        )


class Native(_Registered):
    """C++ on the CPU: float32 and bfloat16, every head size, with and without a cache."""

    summary = "C++, CPU only"

    def unavailable_reason(self, device: torch.device) -> str:
        if device.type not in ("cpu", "meta"):
            return f"it runs on the CPU, not on {device.type}"
        return library.unavailable_reason

    def unsupported_reason(self, case: AttentionProblem) -> str:
        if case.dtype not in (torch.float32, torch.bfloat16):
            return f"it takes float32 and bfloat16, not {dtype_name(case.dtype)}"
        return ""


class Triton(_Registered):
    """Triton on CUDA: float32, bfloat16, float16; head sizes that are multiples of 8 up to 256; every layout."""

    summary = "Triton, straight from the layout's vectors"

    def unavailable_reason(self, device: torch.device) -> str:
        if reason := library.unavailable_reason or why_not_device(device, "8.0 or later", ((8, 99),)):
            return reason
        return "" if has_module("triton") else "triton is not installed; `pip install triton`"

    def unsupported_reason(self, case: AttentionProblem) -> str:
        if case.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it takes float32, bfloat16 and float16, not {dtype_name(case.dtype)}"
        if case.head_dim % 8 or not 0 < case.head_dim <= 256:
            return f"it takes head sizes that are multiples of 8 up to 256, not {case.head_dim}"
        return ""


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from lmfusion_kernels.triton import hybrid_attention

    return hybrid_attention.forward(*arguments)


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from lmfusion_kernels.triton import hybrid_attention

    return hybrid_attention.backward(*arguments)


if library.native:
    _library_of_triton = torch.library.Library("lmfusion", "IMPL")
    _library_of_triton.impl("hybrid_attention", _forward, "CUDA")
    _library_of_triton.impl("hybrid_attention_backward", _backward, "CUDA")
