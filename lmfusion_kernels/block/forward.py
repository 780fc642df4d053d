"""The forward of a two-tower layer, kernel by kernel, and what it keeps for the backward.

Outside attention the forward is 12 kernels on a GPU: two norms, RoPE + reorder, SwiGLU, and four GEMMs per tower. The
result of the output projection goes to the second norm, which adds the residual and returns the sum. The down
projection accumulates onto that sum in place, so the sum becomes the result (an addmm onto another tensor would copy it
first). The same norm writes a copy of the rows of the sum that the backward needs.

With constant tokens there is one more kernel: their attention and that of the live tokens come from two calls and are
concatenated for the text tower's output projection. (Written into one buffer, the constant tokens' rows would be kept
for the backward too.) With QK norm as well there is another: the live rows of qkv are copied out from among the
constant rows.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmfusion_kernels.attention import dispatch
from lmfusion_kernels.attention.interface import AttentionCall
from lmfusion_kernels.block.weights import BlockWeights, Rope, TowerRows, split_towers
from lmfusion_kernels.layout.token_layout import TokenLayout
from lmfusion_kernels.ops.gate_up_swiglu import gate_up_swiglu

_ops: Any = torch.ops.lmfusion


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the block: everything except its rows."""

    layout: TokenLayout
    text: BlockWeights
    image: BlockWeights
    rope: Rope
    attention: str
    """name of an attention kernel"""
    ffn: str
    """name of a kernel of lmfusion_kernels.ops.gate_up_swiglu"""
    recompute: str

    @property
    def towers(self) -> tuple[BlockWeights, BlockWeights]:
        return self.text, self.image

    @property
    def num_heads(self) -> int:
        return self.text.num_heads(self.rope)

    @property
    def num_kv_heads(self) -> int:
        return (self.text.qkv_proj.shape[0] // (2 * self.rope[0].shape[-1]) - self.num_heads) // 2

    @property
    def scale(self) -> float:
        return (2 * self.rope[0].shape[-1]) ** -0.5

    @property
    def has_qk_norm(self) -> bool:
        return any(norm is not None for norm in self.qk_norms)

    @property
    def qk_norms(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        return self.text.q_norm, self.text.k_norm, self.image.q_norm, self.image.k_norm


def choose_attention(
    backend: str | None, x: Tensor, layout: TokenLayout, weights: BlockWeights, rope: Rope, needs_grad: bool
) -> str:
    """The name of the attention kernel for rows like `x`; see `dispatch.choose_kernel`."""
    head_dim, num_heads = 2 * rope[0].shape[-1], weights.num_heads(rope)
    return dispatch.choose_kernel(
        backend, layout, device=x.device, dtype=x.dtype, num_heads=num_heads,
        num_kv_heads=(weights.qkv_proj.shape[0] // head_dim - num_heads) // 2, head_dim=head_dim, needs_grad=needs_grad,
    )  # fmt: skip


class Activations(NamedTuple):
    """What the backward reads, one row for each active token; None if it was not kept."""

    x_live: Tensor
    x_image: Tensor
    k: Tensor | None = None
    """[N, H_kv, D] in sequence order; without q, only the constant tokens, in tower order"""
    v: Tensor | None = None
    q: Tensor | None = None
    out: Tensor | None = None
    """[num_active, H, D], the result of attention in [live | image] order"""
    lse: Tensor | None = None
    rstd_in: Tensor | None = None
    post_attention_live: Tensor | None = None
    """the residual stream after attention"""
    post_attention_image: Tensor | None = None
    rstd_post_attention: Tensor | None = None
    gate_up_live: Tensor | None = None
    gate_up_image: Tensor | None = None
    qkv_live: Tensor | None = None
    """with QK norm"""
    qkv_image: Tensor | None = None


def forward(
    call: Call, x: TowerRows, kv_cache: tuple[Tensor, Tensor] | None, keep: bool, keep_rows: bool = True
) -> tuple[TowerRows, Activations | None]:
    """The output in the form of `x`, and with `keep` what the backward reads.

    keep_rows: whether active rows are copied, so that the constant rows in the same tensor can be freed.
    """
    layout = call.layout
    num_constant = layout.num_constant
    rows = [x] if isinstance(x, Tensor) else list(x)
    is_joined = len(rows) == 1
    has_copies = keep and keep_rows and num_constant > 0
    normed, _, kept, rstd_in = _norm(
        call, "input_layernorm", rows, [], layout.num_text, num_constant, has_copies, has_copies and is_joined
    )
    x_text, x_image = split_towers(x, layout)
    x_live, x_image = (
        [*kept, x_image][:2] if has_copies else (x_text[num_constant:] if num_constant else x_text, x_image)
    )
    attended, saved = _attend(call, normed, kv_cache, keep)
    update = [r.new_empty(r.shape) for r in rows]
    for target, part, w in zip(_split(update, layout.num_text), attended, call.towers, strict=True):
        torch.mm(part, w.o_proj.t(), out=target)
    keep_post_attention, keep_gate_up = keep and call.recompute != "layer", keep and call.recompute == "none"
    normed, post_attention, kept, rstd_post_attention = _norm(
        call,
        "post_attention_layernorm",
        update,
        rows,
        layout.num_text,
        num_constant,
        keep_post_attention,
        keep_post_attention,
    )
    del attended, update  # freed before gate and up, where the forward needs the most memory
    weights = [w.gate_up_proj for w in call.towers]
    hidden, gate_up = gate_up_swiglu(call.ffn, normed, weights, num_constant, keep_gate_up)
    for target, part, w in zip(_split(post_attention, layout.num_text), hidden, call.towers, strict=True):
        torch.addmm(target, part, w.down_proj.t(), out=target)  # as addmm_, which FlopCounterMode does not count
    y: TowerRows = post_attention[0] if is_joined else (post_attention[0], post_attention[1])
    if keep_post_attention:
        saved |= {"rstd_in": rstd_in, "rstd_post_attention": rstd_post_attention}
        saved |= {"post_attention_live": kept[0], "post_attention_image": kept[1]}
    if keep_gate_up:
        saved |= {"gate_up_live": gate_up[0], "gate_up_image": gate_up[1]}
    return y, Activations(x_live, x_image, **saved) if keep else None


def _attend(
    call: Call, normed: list[Tensor], kv_cache: tuple[Tensor, Tensor] | None, keep: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The attention output of each tower, and with `keep` the fields of `Activations` known so far."""
    layout = call.layout
    num_constant = layout.num_constant
    qkv = [_linear(r, w.qkv_proj, w.qkv_bias) for r, w in zip(normed, call.towers, strict=True)]
    q_constant, q, k, v = _rope(call, qkv, kv_cache)
    out, lse = dispatch.forward(call.attention, AttentionCall(q, k, v, layout, "active", call.scale))
    attended = [part.flatten(1) for part in out.tensor_split([layout.num_live])]
    if num_constant:
        constant = AttentionCall(q_constant, k, v, layout, "constant", call.scale)
        out_constant, _ = dispatch.forward(call.attention, constant)
        attended[0] = torch.cat([out_constant.flatten(1), attended[0]])
    if not keep:
        return attended, {}
    if call.recompute == "layer":
        index = layout.tower_to_sequence[:num_constant]
        return attended, {"k": k.index_select(0, index), "v": v.index_select(0, index)} if num_constant else {}
    saved = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
    if call.has_qk_norm:
        qkv_live = qkv[0][num_constant:].clone() if num_constant else qkv[0]
        saved |= {"qkv_live": qkv_live, "qkv_image": qkv[1]}
    return attended, saved


def complete(call: Call, saved: Activations) -> Activations:
    """`saved` completed: what the recompute mode left out is computed again for the active tokens."""
    layout = call.layout
    x = [saved.x_live, saved.x_image]
    if call.recompute == "layer":
        normed, _, _, rstd_in = _norm(call, "input_layernorm", x, [], layout.num_live)
        qkv = [_linear(r, w.qkv_proj, w.qkv_bias) for r, w in zip(normed, call.towers, strict=True)]
        q, k, v = _rope_of_active_rows(call, qkv, saved)
        out, lse = dispatch.forward(call.attention, AttentionCall(q, k, v, layout, "active", call.scale))
        attended = out.flatten(1).tensor_split([layout.num_live])
        update = [torch.mm(part, w.o_proj.t()) for part, w in zip(attended, call.towers, strict=True)]
        normed, post_attention, _, rstd_post_attention = _norm(
            call, "post_attention_layernorm", update, x, layout.num_live
        )
        saved = Activations(
            x[0], x[1], k, v, q, out, lse, rstd_in, post_attention[0], post_attention[1], rstd_post_attention
        )
        if call.has_qk_norm:
            saved = saved._replace(qkv_live=qkv[0], qkv_image=qkv[1])
    else:
        post_attention = [present(saved.post_attention_live), present(saved.post_attention_image)]
        normed, *_ = _norm(call, "post_attention_layernorm", post_attention, [], layout.num_live)
    gate_up = [torch.mm(r, w.gate_up_proj.t()) for r, w in zip(normed, call.towers, strict=True)]
    return saved._replace(gate_up_live=gate_up[0], gate_up_image=gate_up[1])


def present(tensor: Tensor | None) -> Tensor:
    """A tensor that must be there, such as one of `Activations` that was kept or recomputed."""
    assert tensor is not None
    return tensor


def _norm(
    call: Call,
    name: str,
    x: list[Tensor],
    residual: list[Tensor],
    num_text: int,
    num_constant: int = 0,
    keep_text: bool = False,
    keep_image: bool = False,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """The normed rows of each tower; x + residual in the form of `x`; the copies asked for; rstd of every row."""
    *results, rstd = _ops.rms_norm(
        x, residual, getattr(call.text, name), getattr(call.image, name), num_text, call.text.eps, num_constant,
        keep_text, keep_image,
    )  # fmt: skip
    num_sums = len(x) + len(residual)
    return _split(results[: len(x)], num_text), results[len(x) : num_sums], results[num_sums:], rstd


def _rope(
    call: Call, qkv: list[Tensor], kv_cache: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q of the constant tokens, q of the active tokens, k and v: in sequence order."""
    layout = call.layout
    if kv_cache is None:
        return _ops.rope_reorder(
            qkv, *call.rope, layout.tower_to_sequence, layout.order.query_row, layout.num_text, layout.num_constant,
            call.num_heads, *call.qk_norms, call.text.eps,
        )  # fmt: skip
    assert not layout.num_constant  # a cached layout has no constant tokens, because it has no backward at all
    q = _ops.rope_reorder_cached(
        qkv, *call.rope, layout.tower_to_sequence, layout.mask.key, layout.num_text, call.num_heads, *call.qk_norms,
        call.text.eps, *kv_cache,
    )  # fmt: skip
    return q[:0], q, *kv_cache


def _rope_of_active_rows(call: Call, qkv: list[Tensor], saved: Activations) -> tuple[Tensor, Tensor, Tensor]:
    """q of the active tokens; k and v of all tokens, with the constant ones from `saved`.

    The active tokens, by rank, form a sequence of their own, whose keys are written to their places among all keys.
    """
    layout, (cos, sin) = call.layout, call.rope
    num_constant = layout.num_constant
    head_dim = 2 * cos.shape[-1]
    num_kv_heads = (qkv[0].shape[1] // head_dim - call.num_heads) // 2
    k, v = (qkv[0].new_empty(layout.num_tokens, num_kv_heads, head_dim) for _ in range(2))
    rank, key = layout.order.query_row, present(layout.active.key)
    if num_constant:
        index = layout.tower_to_sequence[:num_constant].long()
        k.index_copy_(0, index, present(saved.k))
        v.index_copy_(0, index, present(saved.v))
        rank = rank[num_constant:] - num_constant
        cos, sin = cos.index_select(0, key), sin.index_select(0, key)
    q = _ops.rope_reorder_cached(
        qkv, cos, sin, rank, key, layout.num_live, call.num_heads, *call.qk_norms, call.text.eps, k, v
    )
    return q, k, v


def _split(rows: list[Tensor], num_text: int) -> list[Tensor]:
    """The rows of the text and of the image tower, as views."""
    return rows if len(rows) == 2 else list(rows[0].tensor_split([num_text]))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
