"""A layer that stops gradients instead of freezing weights: text rows are detached after every step.

The switch `freeze_und` of BAGEL's layer does this (modeling/bagel/qwen2_navit.py, PackedAttentionMoT and
Qwen2MoTDecoderLayer): text weights require gradients, and queries, keys, values and both residual branches of text rows
are written back detached. Autograd then sends zeros through all their products. This is our own code, with our
attention.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lmfusion_kernels as lk
from benchmarks.baselines.slabs import rms_norm, rotate, swiglu
from lmfusion_kernels.block.weights import Rope, TowerRows


def freeze_und_block(
    rows: tuple[Tensor, Tensor],
    layout: lk.TokenLayout,
    text: lk.BlockWeights,
    image: lk.BlockWeights,
    rope: Rope,
    **_: Any,
) -> TowerRows:
    """The layer on rows ([num_text, d], [num_image, d]), both of one width; it can stand for `lk.routed_block`."""
    towers = ((slice(0, layout.num_text), text), (slice(layout.num_text, None), image))
    cos, sin = rope
    head_dim = 2 * cos.shape[-1]
    num_heads = text.o_proj.shape[1] // head_dim
    num_kv_heads = (text.qkv_proj.shape[0] // head_dim - num_heads) // 2
    x = torch.cat(rows)

    def detached(packed: Tensor) -> Tensor:
        packed[towers[0][0]] = packed[towers[0][0]].detach()
        return packed

    def by_tower(function: Any, like: Tensor, width: int) -> Tensor:
        packed = like.new_zeros(like.shape[0], width)
        for span, weights in towers:
            packed[span] = function(span, weights)
        return packed

    def normed_heads(heads: Tensor, name: str) -> Tensor:
        if getattr(text, name) is None:
            return heads.clone()
        parts = [rms_norm(heads[span], getattr(weights, name), weights.eps) for span, weights in towers]
        return torch.cat(parts)

    qkv = by_tower(
        lambda span, w: F.linear(rms_norm(x[span], w.input_layernorm, w.eps), w.qkv_proj, w.qkv_bias),
        x,
        text.qkv_proj.shape[0],
    )
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    q, k, v = detached(normed_heads(q, "q_norm")), detached(normed_heads(k, "k_norm")), detached(v.clone())
    q, k, v = (layout.to_sequence_order(heads.flatten(1)).unflatten(1, (-1, head_dim)) for heads in (q, k, v))
    out = lk.hybrid_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, layout).flatten(1)
    out = layout.to_tower_order(out)
    x = x + detached(by_tower(lambda span, w: F.linear(out[span], w.o_proj), out, x.shape[1]))

    def ffn(span: slice, w: lk.BlockWeights) -> Tensor:
        gate_up = F.linear(rms_norm(x[span], w.post_attention_layernorm, w.eps), w.gate_up_proj)
        return F.linear(swiglu(gate_up), w.down_proj)

    y = x + detached(by_tower(ffn, x, x.shape[1]))
    return y[: layout.num_text], y[layout.num_text :]
