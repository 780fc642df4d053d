"""Chooses the attention kernel for a call and runs it: `choose_kernel`, then `forward` and `backward` by name."""

from functools import lru_cache

import torch
from torch import Tensor

from lmfusion_kernels.attention import table
from lmfusion_kernels.attention.flash import TorchFlash
from lmfusion_kernels.attention.flash_attn_2 import FlashAttn2
from lmfusion_kernels.attention.flash_attn_3 import FlashAttn3
from lmfusion_kernels.attention.flash_attn_4 import FlashAttn4
from lmfusion_kernels.attention.flex import Flex
from lmfusion_kernels.attention.interface import AttentionCall, AttentionProblem, Gradients, Kernel, dtype_name
from lmfusion_kernels.attention.reference import Reference
from lmfusion_kernels.attention.torch_ops import Native, Triton
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
"""Kernels to try on a CUDA device, in order, if the measured table has no entry or its kernel cannot run."""


def choose_kernel(
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

    backend: the argument of an op. None: the environment variable LMFUSION_KERNELS_BACKEND decides, and without it the
    fastest kernel as far as measured. "native" means any kernel except the reference.

    Raises ValueError for an unknown name, and for a requested kernel that cannot run; the message says why, and what to
    do.
    """
    problem = AttentionProblem(
        device, dtype, num_heads, num_kv_heads, head_dim, needs_grad, layout.is_cached, layout.has_hidden
    )
    requested = requested_backend(backend)
    if requested is not None and requested != "native":
        if reason := unsupported_reason(requested, problem):
            source = "" if backend else f" by {VARIABLE}"
            others = [name for name in order_for(problem, layout.num_tokens) if not unsupported_reason(name, problem)]
            way_out = f"backend='native' runs {others[0]} attention here" if others else REFERENCE_RUNS
            raise ValueError(f"{requested} attention was asked for{source}, but {reason}; {way_out}")
        return requested
    order = order_for(problem, layout.num_tokens)
    for name in order:
        if not unsupported_reason(name, problem):
            return name
    if requested is not None:
        reasons = "; ".join(f"{name}: {unsupported_reason(name, problem)}" for name in order)
        raise ValueError(f"no native attention can run here ({reasons}); {REFERENCE_RUNS}")
    return "reference"


def order_for(problem: AttentionProblem, num_tokens: int) -> tuple[str, ...]:
    """The kernels to try, best first."""
    if problem.device.type != "cuda":
        return ("native",)
    best: tuple[str, ...] = ()
    device, dtype, head_dim = problem.device, dtype_name(problem.dtype), problem.head_dim
    for min_tokens, kernel in _measured(device, dtype, head_dim, problem.needs_grad):
        if num_tokens >= min_tokens:
            best = (kernel,)
    return best + DEFAULT_ORDER


@constant_result
def _measured(device: torch.device, dtype: str, head_dim: int, needs_grad: bool) -> list[tuple[int, str]]:
    found = capability(device)
    return [] if found is None else table.measured(found, dtype, head_dim)["training" if needs_grad else "forward"]


def explain(name: str, requested: str | None) -> list[str]:
    """For which calls on the current CUDA device kernel `name` is chosen, and whether that choice was measured."""
    if requested is not None and requested != "native":
        return ["because it was asked for"] if requested == name else []
    device = torch.device("cuda", torch.cuda.current_device())
    where: dict[str, list[str]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim in (64, 96, 128, 256):
            for needs_grad in (False, True):
                problem = AttentionProblem(device, dtype, 32, 8, head_dim, needs_grad, is_cached=False)
                best = _measured(device, dtype_name(dtype), head_dim, needs_grad)
                call = f"{dtype_name(dtype)} heads of {head_dim}" + (" with gradients" if needs_grad else "")
                if any(kernel == name for _, kernel in best) and not unsupported_reason(name, problem):
                    where.setdefault("measured", []).append(call)
                elif (
                    next((kernel for kernel in DEFAULT_ORDER if not unsupported_reason(kernel, problem)), None) == name
                    and not best
                ):
                    where.setdefault("by default, not measured", []).append(call)
    return [f"{reason}: {' | '.join(calls)}" if len(calls) < 16 else reason for reason, calls in where.items()]


def unsupported_reason(name: str, problem: AttentionProblem) -> str:
    """Why kernel `name` cannot run `problem`, as the rest of a sentence; empty if it can."""
    return unavailable_reason(name, problem.device) or KERNELS[name].unsupported_reason(problem)


@constant_result
def unavailable_reason(name: str, device: torch.device) -> str:
    """Why kernel `name` cannot run on `device` at all. Found out once per process."""
    return _cached_unavailable_reason(name, device)


@lru_cache
def _cached_unavailable_reason(name: str, device: torch.device) -> str:
    return KERNELS[name].unavailable_reason(device)


def forward(kernel: str, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """out and lse by the kernel of this name; shapes and orders: `interface.Kernel`."""
    if call.scale < 0:  # some kernels assume that the largest score is also the largest scaled score
        call = call._replace(q=-call.q, scale=-call.scale)
    return KERNELS[kernel].forward(call)


def backward(kernel: str, call: AttentionCall, dout: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    """dq, dk, dv from `out` and `lse` of `forward`; dk, dv of all keys ("all") or of the active tokens ("active")."""
    if call.scale < 0:
        negated = call._replace(q=-call.q, scale=-call.scale)
        dq, dk, dv = KERNELS[kernel].backward(negated, dout, out, lse)
        return -dq, dk, dv
    return KERNELS[kernel].backward(call, dout, out, lse)
