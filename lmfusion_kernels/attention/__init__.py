"""Which kernel computes hybrid attention here, and how is each called?

`choose` names a kernel, `forward` and `backward` run it. A kernel is one file of this folder; none imports an optional
package before it is considered for a call.

| name           | what it is                                                        | needs                         |
| -------------- | ----------------------------------------------------------------- | ----------------------------- |
| native         | C++ (csrc/cpu/hybrid_attention_op.cpp)                                   | a CPU                         |
| triton         | Triton, from the layout's vectors                                 | CUDA, triton                  |
| flash          | two causal calls of PyTorch's FlashAttention-2                    | CUDA 8.0                      |
| flash-attn-2   | two causal calls of FlashAttention-2                              | CUDA 8.0, flash-attn          |
| flash-attn-3   | two causal calls of FlashAttention-3                              | CUDA 9.0, flash-attn-3        |
| flash-attn-4   | FlashAttention-4 with block lists of the mask; no hidden spans    | CUDA 9.0, flash-attn-4        |
| flex           | FlexAttention with a block mask                                   | CUDA 8.0, or a CPU to compare |
| reference      | plain PyTorch                                                     | nothing                       |
"""

from functools import lru_cache

import torch
from torch import Tensor

from lmfusion_kernels.attention import table
from lmfusion_kernels.attention.flash import TorchFlash
from lmfusion_kernels.attention.flash_attn_2 import FlashAttn2
from lmfusion_kernels.attention.flash_attn_3 import FlashAttn3
from lmfusion_kernels.attention.flash_attn_4 import FlashAttn4
from lmfusion_kernels.attention.flex import Flex
from lmfusion_kernels.attention.interface import AttentionProblem, Kernel, QueryRows, dtype_name
from lmfusion_kernels.attention.reference import Reference
from lmfusion_kernels.attention.registered import Native, Triton
from lmfusion_kernels.attention.two_pass import TwoPass
from lmfusion_kernels.layout.token_layout import TokenLayout
from lmfusion_kernels.runtime.backends import REFERENCE_RUNS, VARIABLE, requested_backend
from lmfusion_kernels.runtime.device import capability, constant_result

KERNELS: dict[str, Kernel] = {
    "native": Native(),
    "triton": Triton(),
    "flash": TwoPass(TorchFlash()),
    "flash-attn-2": TwoPass(FlashAttn2()),
    "flash-attn-3": TwoPass(FlashAttn3()),
    "flash-attn-4": FlashAttn4(),
    "flex": Flex(),
    "reference": Reference(),
}
DEFAULT_ORDER = ("triton", "flash")
"""What is tried on a CUDA device, in this order, where the measured table says nothing or names what is not here."""


def choose(
    backend: str | None,
    layout: TokenLayout,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    needs_grad: bool,
) -> str:
    """The name of the kernel that runs attention with tensors of this kind.

    backend: the argument of an op (None: the environment variable LMFUSION_KERNELS_BACKEND decides, and without it the
    fastest kernel as far as measured). "native" means any kernel but the reference.

    Raises ValueError for an unknown name, and when what was asked for cannot run; the message says why, and how to get
    it.
    """
    case = AttentionProblem(
        device, dtype, num_heads, num_kv_heads, head_dim, needs_grad, layout.is_cached, layout.has_hidden
    )
    asked = requested_backend(backend)
    if asked is not None and asked != "native":
        if reason := unsupported_reason(asked, case):
            source = "" if backend else f" by {VARIABLE}"
            others = [name for name in order_for(case, layout.num_tokens) if not unsupported_reason(name, case)]
            way_out = f"backend='native' runs {others[0]} attention here" if others else REFERENCE_RUNS
            raise ValueError(f"{asked} attention was asked for{source}, but {reason}; {way_out}")
        return asked
    order = order_for(case, layout.num_tokens)
    for name in order:
        if not unsupported_reason(name, case):
            return name
    if asked is not None:
        reasons = "; ".join(f"{name}: {unsupported_reason(name, case)}" for name in order)
        raise ValueError(f"no native attention can run here ({reasons}); {REFERENCE_RUNS}")
    return "reference"


def order_for(case: AttentionProblem, num_tokens: int) -> tuple[str, ...]:
    """The kernels to try, best first."""
    if case.device.type != "cuda":
        return ("native",)
    best: tuple[str, ...] = ()
    for min_tokens, kernel in _measured(case.device, dtype_name(case.dtype), case.head_dim, case.needs_grad):
        if num_tokens >= min_tokens:
            best = (kernel,)
    return best + DEFAULT_ORDER


@constant_result
def _measured(device: torch.device, dtype: str, head_dim: int, needs_grad: bool) -> list[tuple[int, str]]:
    found = capability(device)
    return [] if found is None else table.measured(found, dtype, head_dim)["training" if needs_grad else "forward"]


def explain(name: str, asked: str | None) -> list[str]:
    """Where kernel `name` is chosen on the current CUDA device, and whether because that was measured."""
    if asked is not None and asked != "native":
        return ["because it was asked for"] if asked == name else []
    device = torch.device("cuda", torch.cuda.current_device())
    where: dict[str, list[str]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim in (64, 96, 128, 256):
            for needs_grad in (False, True):
                case = AttentionProblem(device, dtype, 32, 8, head_dim, needs_grad, is_cached=False)
                best = _measured(device, dtype_name(dtype), head_dim, needs_grad)
                call = f"{dtype_name(dtype)} heads of {head_dim}" + (" with gradients" if needs_grad else "")
                if any(kernel == name for _, kernel in best) and not unsupported_reason(name, case):
                    where.setdefault("measured", []).append(call)
                elif (
                    next((kernel for kernel in DEFAULT_ORDER if not unsupported_reason(kernel, case)), None) == name
                    and not best
                ):
                    where.setdefault("by default, not measured", []).append(call)
    return [f"{reason}: {' | '.join(calls)}" if len(calls) < 16 else reason for reason, calls in where.items()]


def unsupported_reason(name: str, case: AttentionProblem) -> str:
    """Why kernel `name` cannot run `case`, as the rest of a sentence; empty if it can."""
    return unavailable_reason(name, case.device) or KERNELS[name].unsupported_reason(case)


@constant_result
def unavailable_reason(name: str, device: torch.device) -> str:
    """Why kernel `name` cannot run on `device` at all. EngineRequest once a process: an answer is kept."""
    return _why_absent(name, device)


@lru_cache
def _why_absent(name: str, device: torch.device) -> str:
    return KERNELS[name].unavailable_reason(device)


def forward(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, rows: QueryRows, scale: float
) -> tuple[Tensor, Tensor]:
    """out and lse by the kernel of this name, for the queries of `rows`; shapes and orders: `case.Kernel`."""
    if scale < 0:  # some kernels take the largest score for the largest scaled score
        q, scale = -q, -scale
    return KERNELS[kernel].forward(q, k, v, layout, rows, scale)


def backward(
    kernel: str,
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
    """dq, dk, dv from `out` and `lse` of `forward`; dk, dv of all keys ("all") or of layout.active_key ("active")."""
    if scale < 0:
        dq, dk, dv = KERNELS[kernel].backward(dout, -q, k, v, out, lse, layout, rows, -scale)
        return -dq, dk, dv
    return KERNELS[kernel].backward(dout, q, k, v, out, lse, layout, rows, scale)
