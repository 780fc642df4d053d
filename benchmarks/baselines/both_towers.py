"""Both towers on all tokens, then torch.where, as in a model without routing: twice the FLOPs, no gather.

Rows are in sequence order; attention is the same op as in the block.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import lmfusion_kernels as lk
from benchmarks.baselines.slabs import rms_norm, rotate, swiglu
from benchmarks.harness.layer import Layer, LayerCase


def both_towers(case: LayerCase) -> Layer:
    """The layer, which keeps rows in sequence order."""
    layout, shape = case.layout, case.shape
    is_image = (layout.sequence_to_tower >= layout.num_text)[:, None]
    cos, sin = case.rope

    def select(function: Callable[[lk.BlockWeights], Tensor]) -> Tensor:
        text, image = function(case.text), function(case.image)
        mask = is_image if text.dim() == 2 else is_image[..., None]
        return torch.where(mask, image, text)

    def forward(x: Tensor) -> Tensor:
        h = select(lambda w: rms_norm(x, w.input_layernorm, w.eps))
        qkv = select(lambda w: F.linear(h, w.qkv_proj, w.qkv_bias)).unflatten(1, (-1, shape.head_dim))
        q, k, v = qkv.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
        if shape.qk_norm:
            heads_q, heads_k = q, k
            q = select(lambda w: rms_norm(heads_q, w.q_norm, w.eps))  # type: ignore[arg-type]
            k = select(lambda w: rms_norm(heads_k, w.k_norm, w.eps))  # type: ignore[arg-type]
        out = lk.hybrid_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, layout).flatten(1)
        middle = x + select(lambda w: F.linear(out, w.o_proj))
        g = select(lambda w: rms_norm(middle, w.post_attention_layernorm, w.eps))
        return middle + select(lambda w: F.linear(swiglu(F.linear(g, w.gate_up_proj)), w.down_proj))

    return Layer(forward, case.weights, "sequence")
