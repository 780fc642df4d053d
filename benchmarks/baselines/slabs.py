"""The main baseline: rows permuted into slabs once, two cuBLAS calls per projection, torch.compile for the rest.

A careful user of PyTorch would write this: tower order from layer to layer, one GEMM per tower with the residual added
in its epilogue, gathers fused by the compiler into RoPE and QK norm, and permutations whose gradients are gathers.
Attention is the same op as in the block, so a ratio shows everything but attention.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lmfusion_kernels as lk
from benchmarks.harness.layer import Layer, LayerCase

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Permute(torch.autograd.Function):
    """Reorder rows; the gradient is a gather by the inverse, not a scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        _, inverse = ctx.saved_tensors
        return dy.index_select(0, inverse), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate.float()) * up.float()).to(gate_up.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def heads_in_sequence_order(
    text: Tensor,
    image: Tensor,
    cos: Tensor,
    sin: Tensor,
    to_sequence: Tensor,
    to_tower: Tensor,
    num_heads: int,
    num_kv_heads: int,
    norms: tuple[Tensor | None, ...],
    eps: float,
) -> tuple[Tensor, ...]:
    """q, k, v in sequence order from both towers' qkv; RoPE on q and k, after their norms if there are any."""
    parts = []
    for tower, (q_norm, k_norm) in zip((text, image), (norms[:2], norms[2:]), strict=True):
        heads = tower.unflatten(1, (num_heads + 2 * num_kv_heads, -1))
        q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        if q_norm is not None and k_norm is not None:
            q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
        parts.append((q, k, v))
    q, k, v = (Permute.apply(torch.cat(pair), to_sequence, to_tower) for pair in zip(*parts, strict=True))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


@dataclass(frozen=True)
class Pointwise:
    """The parts between the GEMMs."""

    rms_norm: Callable[..., Tensor]
    swiglu: Callable[..., Tensor]
    heads_in_sequence_order: Callable[..., tuple[Tensor, ...]]


@functools.cache
def pointwise(is_compiled: bool) -> Pointwise:
    """The function compiled for any number of rows, or as it is."""
    parts = (rms_norm, swiglu, heads_in_sequence_order)
    if not is_compiled:
        return Pointwise(*parts)
    torch._dynamo.config.recompile_limit = 64  # one per shape, dtype and set of gradients
    return Pointwise(*(compiled_by_rows(part) for part in parts))


def compiled_by_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with the number of rows left open, so that one compilation serves every split of the tokens."""
    compiled = torch.compile(function)

    def call(*args: Any) -> Any:
        for arg in args:
            if isinstance(arg, Tensor) and (arg.dim() > 1 or not arg.is_floating_point()):
                torch._dynamo.maybe_mark_dynamic(arg, 0)
        return compiled(*args)

    return call


def slabs(
    case: LayerCase, is_compiled: bool, attend: Attend | None = None, kv_cache: tuple[Tensor, Tensor] | None = None
) -> Layer:
    """The layer on slabs. attend: attention in sequence order; default the package's own."""
    parts, layout, shape = pointwise(is_compiled), case.layout, case.shape
    towers = (case.text, case.image)
    norms = tuple(norm for w in towers for norm in (w.q_norm, w.k_norm))
    to_sequence, to_tower = layout.sequence_to_tower.long(), layout.tower_to_sequence.long()
    slot = layout.mask.key.long()
    cos, sin = case.rope

    def forward(x_text: Tensor, x_image: Tensor) -> tuple[Tensor, Tensor]:
        xs = (x_text, x_image)
        normed = [parts.rms_norm(x, w.input_layernorm, w.eps) for x, w in zip(xs, towers, strict=True)]
        qkv = [F.linear(x, w.qkv_proj, w.qkv_bias) for x, w in zip(normed, towers, strict=True)]
        q, k, v = parts.heads_in_sequence_order(
            *qkv, cos, sin, to_sequence, to_tower, shape.num_heads, shape.num_kv_heads, norms, case.text.eps
        )
        if kv_cache is not None:
            k, v = (cache.index_copy_(0, slot, new) for cache, new in zip(kv_cache, (k, v), strict=True))
        out = attend(q, k, v) if attend else lk.hybrid_attention(q, k, v, layout)
        rows = Permute.apply(out.flatten(1), to_tower, to_sequence).split([layout.num_text, layout.num_image])
        xs = tuple(torch.addmm(x, r, w.o_proj.t()) for x, r, w in zip(xs, rows, towers, strict=True))
        normed = [parts.rms_norm(x, w.post_attention_layernorm, w.eps) for x, w in zip(xs, towers, strict=True)]
        hidden = [parts.swiglu(F.linear(x, w.gate_up_proj)) for x, w in zip(normed, towers, strict=True)]
        text, image = (torch.addmm(x, h, w.down_proj.t()) for x, h, w in zip(xs, hidden, towers, strict=True))
        return text, image

    return Layer(forward, case.weights)
