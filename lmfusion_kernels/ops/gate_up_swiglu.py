"""Gate and up projection followed by SwiGLU: chooses the kernel and calls it.

"two-calls" (the default): one cuBLAS call per tower, then the op `swiglu`. "triton": one persistent GEMM with SwiGLU in
its epilogue, lmfusion_kernels/triton/gate_up_swiglu.py, which says when that pays. "quack": the gated GEMM of QuACK
(package quack-kernels), one call per tower. The environment variable LMFUSION_KERNELS_FFN selects one, for
`routed_swiglu` and `routed_block`. "triton" and "quack" have not run on a GPU yet, so nothing else chooses them.

QuACK reads gate and up of the weight side by side, as they are stored here, but writes them interleaved. So it can
run only if they are not kept: without a gradient, and in the block with recompute="ffn" or "layer".

`torch.nn.functional.grouped_mm` is not used: it takes the towers' weights as one tensor [2, K, N], and the two
parameters would have to be copied into it in every call.
"""

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmfusion_kernels.runtime.device import constant_result

FFN_KERNELS = ("two-calls", "triton", "quack")

_ops = torch.ops.lmfusion


def choose_ffn(x: Sequence[Tensor], weights: Sequence[Tensor], keep: bool) -> str:
    """The kernel that `gate_up_swiglu` runs with: LMFUSION_KERNELS_FFN, or "two-calls".

    x: rows of the text and the image tower; weights: their gate_up_proj [2 I, d]; keep: whether a backward needs gate
    and up. Raises ValueError for an unknown name, and for a requested kernel that cannot run, with the reason.
    """
    requested = os.environ.get("LMFUSION_KERNELS_FFN") or "two-calls"
    if requested not in FFN_KERNELS:
        raise ValueError(f"LMFUSION_KERNELS_FFN={requested!r} is unknown; known: {', '.join(FFN_KERNELS)}")
    if requested != "two-calls" and (reason := _unsupported_reason(requested, x, weights, keep)):
        raise ValueError(f"LMFUSION_KERNELS_FFN={requested} was asked for, but {reason}; two-calls runs everywhere")
    return requested


def gate_up_swiglu(
    kernel: str, x: Sequence[Tensor], weights: Sequence[Tensor], num_constant: int, keep: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """silu(x @ gate^T) * (x @ up^T) of the text and the image rows; with `keep` also their gate and up.

    Per tower: x [n, d], weights [2 I, d], gate then up. Returns ([n, I] per tower, [n, 2 I] per tower or []). The
    text tower's gate and up begin at row num_constant, in memory of their own.
    """
    if kernel != "two-calls":
        hidden_text, hidden_image, *gate_up = _ops.gate_up_swiglu(*x, *weights, num_constant, keep, kernel)
        return [hidden_text, hidden_image], gate_up
    gate_up = [torch.mm(rows, weight.t()) for rows, weight in zip(x, weights, strict=True)]
    has_copy = keep and num_constant > 0
    hidden_text, hidden_image, *copies = _ops.swiglu(gate_up, num_constant, has_copy)
    kept = [*copies, gate_up[1]] if has_copy else gate_up
    return [hidden_text, hidden_image], kept if keep else []


def _unsupported_reason(kernel: str, x: Sequence[Tensor], weights: Sequence[Tensor], keep: bool) -> str:
    """Why `kernel` cannot run here, as the rest of a sentence; empty if it can."""
    device, dtype = x[0].device, x[0].dtype
    if reason := _unavailable_reason(kernel, device):
        return reason
    if device.type == "cuda" and dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    step = 16 // x[0].element_size()
    for weight in weights:
        if weight.shape[1] % step or weight.shape[0] % (2 * step):
            return (
                f"it takes widths in multiples of {step}, and gate_up_proj is {tuple(weight.shape)} "
                f"(2 x {weight.shape[0] // 2} rows)"
            )
    if kernel == "quack" and keep:
        return (
            "it writes gate and up interleaved, which no backward here reads; a block with recompute='ffn' keeps none"
        )
    return ""


@constant_result
def _unavailable_reason(kernel: str, device: torch.device) -> str:
    """Why `kernel` cannot run on `device` whatever the tensors."""
    if kernel == "triton":
        if not importlib.util.find_spec("triton"):
            return "triton is not installed; `pip install triton`"
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            return ""
    else:
        try:
            importlib.metadata.version("quack-kernels")
        except importlib.metadata.PackageNotFoundError:
            return "QuACK is not installed; `pip install quack-kernels`"
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 9 else f"it needs compute capability 9.0, not {major}.{minor}"


def _gate_up_swiglu(
    x_text: Tensor,
    x_image: Tensor,
    text_weight: Tensor,
    image_weight: Tensor,
    num_constant: int,
    keep: bool,
    kernel: str,
) -> list[Tensor]:
    if kernel == "quack":
        from quack.gemm_interface import gemm_gated

        # Not tuned: its tuner measures during the first call, which waits for the device. "B": see _unsupported_reason.
        return [
            gemm_gated(rows, weight.t(), activation="swiglu", store_preact=False, tuned=False, concat_layout=("B",))[1]
            for rows, weight in ((x_text, text_weight), (x_image, image_weight))
        ]
    from lmfusion_kernels.triton import gate_up_swiglu as triton_gate_up_swiglu

    hidden, gate_up = triton_gate_up_swiglu.forward((x_text, x_image), (text_weight, image_weight), num_constant, keep)
    return [*hidden, *gate_up]


def _fake(
    x_text: Tensor,
    x_image: Tensor,
    text_weight: Tensor,
    image_weight: Tensor,
    num_constant: int,
    keep: bool,
    kernel: str,
) -> list[Tensor]:
    towers = ((x_text, text_weight, num_constant), (x_image, image_weight, 0))
    hidden = [rows.new_empty(rows.shape[0], weight.shape[0] // 2) for rows, weight, _ in towers]
    if not keep:
        return hidden
    return hidden + [rows.new_empty(rows.shape[0] - first, weight.shape[0]) for rows, weight, first in towers]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x_text, x_image, text_weight, image_weight, num_constant, keep, _ = inputs
    assert keep and not num_constant, "a gradient needs gate and up of all rows"
    ctx.save_for_backward(x_text, x_image, text_weight, image_weight, *output[2:])
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    x, weights, gate_up = tensors[:2], tensors[2:4], tensors[4:]
    needs = ctx.needs_input_grad
    dgate_up = _ops.swiglu_backward(grads[:2], gate_up, False)
    dx = [torch.mm(d, w) if need else None for d, w, need in zip(dgate_up, weights, needs[:2], strict=True)]
    dweights = [torch.mm(d.t(), rows) if need else None for d, rows, need in zip(dgate_up, x, needs[2:4], strict=True)]
    return *dx, *dweights, None, None, None


library = torch.library.Library("lmfusion", "FRAGMENT")
library.define(
    "gate_up_swiglu(Tensor x_text, Tensor x_image, Tensor text_weight, Tensor image_weight, SymInt num_constant, "
    "bool keep, str kernel) -> Tensor[]"
)
library.impl("gate_up_swiglu", _gate_up_swiglu, "CompositeExplicitAutograd")
torch.library.register_fake("lmfusion::gate_up_swiglu", _fake, lib=library)
torch.library.register_autograd("lmfusion::gate_up_swiglu", _backward, setup_context=_setup_context, lib=library)
