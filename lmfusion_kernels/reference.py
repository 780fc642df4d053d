"""The specification: every op in plain PyTorch, any dtype up to float64, with PyTorch's own autograd.

Equations are those of LMFusion (arXiv 2412.15188, section 3). Every fast path of the package is tested against this
file. It builds an [N, N] mask, so it is for tests and small inputs.
"""

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from lmfusion_kernels.block.weights import BlockWeights, Rope, TowerRows, join_towers, split_towers
from lmfusion_kernels.layout.token_layout import TokenLayout


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in float32 or wider, rounded once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(wide.dtype)).to(x.dtype)


@overload
def routed_rms_norm(
    x: TowerRows, text_weight: Tensor, image_weight: Tensor, layout: TokenLayout, eps: float, residual: None = None
) -> TowerRows: ...
@overload
def routed_rms_norm(
    x: TowerRows, text_weight: Tensor, image_weight: Tensor, layout: TokenLayout, eps: float, residual: TowerRows
) -> tuple[TowerRows, TowerRows]: ...
def routed_rms_norm(
    x: TowerRows,
    text_weight: Tensor,
    image_weight: Tensor,
    layout: TokenLayout,
    eps: float,
    residual: TowerRows | None = None,
) -> TowerRows | tuple[TowerRows, TowerRows]:
    """The norms that equations 7 and 11 fold into QKV and FFN, each row with its tower's weight.

    With `residual`, normalises x + residual and returns (normed, x + residual).
    """
    x_text, x_image = split_towers(x, layout)
    if residual is not None:
        residual_text, residual_image = split_towers(residual, layout)
        x_text, x_image = x_text + residual_text, x_image + residual_image
    normed = join_towers(rms_norm(x_text, text_weight, eps), rms_norm(x_image, image_weight, eps), like=x)
    return normed if residual is None else (normed, join_towers(x_text, x_image, like=x))


def routed_linear(
    x: TowerRows,
    text_weight: Tensor,
    image_weight: Tensor,
    layout: TokenLayout,
    text_bias: Tensor | None = None,
    image_bias: Tensor | None = None,
) -> TowerRows:
    """Equations 7, 8 and 10: each row through the projection of its own tower."""
    x_text, x_image = split_towers(x, layout)
    return join_towers(F.linear(x_text, text_weight, text_bias), F.linear(x_image, image_weight, image_bias), like=x)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, with gate_up [N, 2 I] the two halves side by side; in float32 or wider, rounded once."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def routed_swiglu(
    x: TowerRows,
    text_gate_up: Tensor,
    text_down: Tensor,
    image_gate_up: Tensor,
    image_down: Tensor,
    layout: TokenLayout,
) -> TowerRows:
    """Equations 11 and 12: each row through the feed-forward network of its own tower.

    gate_up [2 I, d] holds the gate's rows, then the up projection's; down is [d, I].
    """
    x_text, x_image = split_towers(x, layout)
    text = F.linear(swiglu(F.linear(x_text, text_gate_up)), text_down)
    image = F.linear(swiglu(F.linear(x_image, image_gate_up)), image_down)
    return join_towers(text, image, like=x)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[k], x[k + D/2]) of heads x [N, H, D] by the angles of cos, sin [N, D/2]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    cos, sin = cos.to(wide.dtype)[:, None], sin.to(wide.dtype)[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def rope_reorder(
    qkv: TowerRows,
    layout: TokenLayout,
    rope: Rope,
    num_heads: int,
    text_q_norm: Tensor | None = None,
    text_k_norm: Tensor | None = None,
    image_q_norm: Tensor | None = None,
    image_k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of both towers from tower order to sequence order, with RoPE on q and k (equation 9).

    qkv: [N, (H + 2 H_kv) D] in tower order. rope: cos, sin [N, D/2] in sequence order. The optional norm weights [D]
    are applied per head before the rotation (Qwen3). Returns q [N, H, D], k and v [N, H_kv, D].
    """
    cos, sin = rope
    head_dim = 2 * cos.shape[-1]
    parts = []
    norms = ((text_q_norm, text_k_norm), (image_q_norm, image_k_norm))
    for tower, (q_norm, k_norm) in zip(split_towers(qkv, layout), norms, strict=True):
        heads = tower.unflatten(-1, (-1, head_dim))
        num_kv_heads = (heads.shape[1] - num_heads) // 2
        q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        if q_norm is not None:
            q = rms_norm(q, q_norm, eps)
        if k_norm is not None:
            k = rms_norm(k, k_norm, eps)
        parts.append((q, k, v))
    q, k, v = (layout.to_sequence_order(torch.cat(pair)) for pair in zip(*parts, strict=True))
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


def hybrid_mask(layout: TokenLayout) -> Tensor:
    """Bool [N, num_keys]: True where a query sees a key. Causal text, bidirectional images, separate documents; keys
    of hidden spans are seen only from within."""
    key = torch.arange(layout.num_keys, device=layout.device)
    mask = (key >= layout.key_start[:, None]) & (key < layout.key_end[:, None])
    if layout.has_hidden:  # without a cache: keys and queries are the same tokens
        mask &= key[:, None] < layout.mask.visible_end
    return mask


def hybrid_attention(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, scale: float | None = None) -> Tensor:
    """Equation 9: softmax attention of all tokens under the hybrid mask.

    q [N, H, D], k and v [num_keys, H_kv, D] in sequence order; H is a multiple of H_kv. Returns [N, H, D]. scale
    defaults to D ** -0.5. A query that sees nothing but scores of -inf gets 0, as from torch's own attention.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    k, v = (x.to(wide).repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q.to(wide), k) * scale
    scores = scores.masked_fill(~hybrid_mask(layout), float("-inf"))
    sees_nothing = (scores == float("-inf")).all(dim=-1, keepdim=True)  # the softmax of such a row would be NaN
    weights = scores.masked_fill(sees_nothing, 0.0).softmax(dim=-1).masked_fill(sees_nothing, 0.0)
    return torch.einsum("hnm,mhd->nhd", weights, v).to(q.dtype)


def routed_block(
    x: TowerRows,
    layout: TokenLayout,
    text: BlockWeights,
    image: BlockWeights,
    rope: Rope,
    order: str = "tower",
    kv_cache: tuple[Tensor, Tensor] | None = None,
) -> TowerRows:
    """One two-tower decoder layer, equations 7 to 12 with Llama's residual connections.

    x in tower order ([N, d], or one tensor per tower), or with `order="sequence"` [N, d] in sequence order. Keys and
    values of a cached layout are written into `kv_cache` (k, v [num_keys, H_kv, D]) in place.
    """
    if order == "sequence":
        assert isinstance(x, Tensor)
        y = routed_block(layout.to_tower_order(x), layout, text, image, rope, "tower", kv_cache)
        assert isinstance(y, Tensor)
        return layout.to_sequence_order(y)
    x = detach_constant_tokens(x, layout)
    normed = routed_rms_norm(x, text.input_layernorm, image.input_layernorm, layout, text.eps)
    qkv = routed_linear(normed, text.qkv_proj, image.qkv_proj, layout, text.qkv_bias, image.qkv_bias)
    q, k, v = rope_reorder(
        qkv, layout, rope, text.num_heads(rope), text.q_norm, text.k_norm, image.q_norm, image.k_norm, text.eps
    )
    if kv_cache is not None:
        assert layout.mask.key is not None
        slot = layout.mask.key.long()
        k, v = (cache.index_copy_(0, slot, new) for cache, new in zip(kv_cache, (k, v), strict=True))
    out = layout.to_tower_order(hybrid_attention(q, k, v, layout).flatten(1))
    out_rows = out if isinstance(x, Tensor) else split_towers(out, layout)
    attended = routed_linear(out_rows, text.o_proj, image.o_proj, layout)
    x = add_rows(x, attended, layout)
    normed = routed_rms_norm(x, text.post_attention_layernorm, image.post_attention_layernorm, layout, text.eps)
    fed = routed_swiglu(normed, text.gate_up_proj, text.down_proj, image.gate_up_proj, image.down_proj, layout)
    return add_rows(x, fed, layout)


def add_rows(x: TowerRows, y: TowerRows, layout: TokenLayout) -> TowerRows:
    """x + y, tower by tower."""
    (x_text, x_image), (y_text, y_image) = split_towers(x, layout), split_towers(y, layout)
    return join_towers(x_text + y_text, x_image + y_image, like=x)


def detach_constant_tokens(x: TowerRows, layout: TokenLayout) -> TowerRows:
    """Cut the gradient of the constant tokens, which depend on nothing that is trained."""
    x_text, x_image = split_towers(x, layout)
    constant, live = x_text.tensor_split([layout.num_constant])
    return join_towers(torch.cat([constant.detach(), live]), x_image, like=x)
