"""A two-tower layer in sequence order that gathers and scatters around every op, as BAGEL's MoT layer does.

Norms, the projections of q, k and v, QK norms, output projection and MLP each gather the rows of a tower from the
packed sequence, and scatter the results of its module into a buffer of zeros. Attention is the same op as in the block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import lmfusion_kernels as lk
from benchmarks.harness.layer import Layer, LayerCase


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def gather_scatter(case: LayerCase) -> Layer:
    """The layer, which keeps rows in sequence order."""
    layout, shape = case.layout, case.shape
    order = layout.tower_to_sequence.long()
    towers = ((case.text, order[: layout.num_text]), (case.image, order[layout.num_text :]))
    sizes = [shape.num_heads * shape.head_dim] + 2 * [shape.num_kv_heads * shape.head_dim]
    cos, sin = (torch.cat([table, table], dim=-1)[:, None].to(case.dtype) for table in case.rope)

    def routed(x: Tensor, width: int, function) -> Tensor:  # type: ignore[no-untyped-def]
        out = x.new_zeros((x.shape[0], *x.shape[1:-1], width))
        for weights, index in towers:
            out[index] = function(x[index], weights)
        return out

    def projected(h: Tensor, part: int) -> Tensor:
        def project(rows: Tensor, w: lk.BlockWeights) -> Tensor:
            bias = None if w.qkv_bias is None else w.qkv_bias.split(sizes)[part]
            return F.linear(rows, w.qkv_proj.split(sizes)[part], bias)

        return routed(h, sizes[part], project).unflatten(1, (-1, shape.head_dim))

    def mlp(rows: Tensor, w: lk.BlockWeights) -> Tensor:
        gate, up = w.gate_up_proj.chunk(2)
        rows = rms_norm(rows, w.post_attention_layernorm, w.eps)
        return F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), w.down_proj)

    def forward(x: Tensor) -> Tensor:
        d = x.shape[1]
        h = routed(x, d, lambda rows, w: rms_norm(rows, w.input_layernorm, w.eps))
        q, k, v = (projected(h, part) for part in range(3))
        if shape.qk_norm:
            q = routed(q, shape.head_dim, lambda rows, w: rms_norm(rows, w.q_norm, w.eps))
            k = routed(k, shape.head_dim, lambda rows, w: rms_norm(rows, w.k_norm, w.eps))
        q, k = (heads * cos + rotate_half(heads) * sin for heads in (q, k))
        out = lk.hybrid_attention(q, k, v, layout).flatten(1)
        x = x + routed(out, d, lambda rows, w: F.linear(rows, w.o_proj))
        return x + routed(x, d, mlp)

    return Layer(forward, case.weights, "sequence")
