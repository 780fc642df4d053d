"""`routed_block`: one two-tower decoder layer as a single autograd node. Checks arguments and chooses kernels.

The node keeps, in bytes per token, for elements of e bytes (d: width of the token's tower, I: its FFN width,
H, H_kv, D: query heads, key-value heads and their size), by recompute=:

| token | "none" | "ffn" | "layer" |
| --- | --- | --- | --- |
| constant | 2 H_kv D e + 8 | the same | 2 H_kv D e |
| live, image | (2 d + 2 H D + 2 H_kv D + 2 I) e + 4 H + 8 | (2 d + 2 H D + 2 H_kv D) e + 4 H + 8 | d e |
| with QK norm | (H + 2 H_kv) D e more | the same more | nothing more |
| LMFusion-8B in bfloat16: constant | 4,104 | 4,104 | 4,096 |
| live, image | 94,344 | 37,000 | 8,192 |

These are: the input, the residual stream after attention, query and attention output, key and value, gate and up; in
float32 the log-sum-exp of each head and two reciprocal root mean squares. The backward kernels recompute norm outputs
and the SwiGLU product in any mode. If there are constant tokens, the active rows of the input are copied so that the
rest can be freed (the image rows of a pair are never copied); otherwise the input is the caller's own tensor.

"ffn" recomputes gate and up from the residual stream after attention: one norm and the gate-up GEMMs of the active
tokens, 4 d I FLOPs per token. "layer" recomputes the whole forward of the active tokens except the down projection.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lmfusion_kernels import reference
from lmfusion_kernels.block import backward as block_backward
from lmfusion_kernels.block import forward as block_forward
from lmfusion_kernels.block import op as block_op
from lmfusion_kernels.block.weights import BlockWeights, Rope, TowerRows, split_towers
from lmfusion_kernels.layout.token_layout import TokenLayout
from lmfusion_kernels.ops.gate_up_swiglu import choose_ffn
from lmfusion_kernels.runtime.backends import choose_backend
from lmfusion_kernels.runtime.transforms import is_tracing
from lmfusion_kernels.runtime.validation import check_rope, check_weight

RECOMPUTE = ("none", "ffn", "layer")
_WEIGHT_NAMES = block_backward.WEIGHT_NAMES


def routed_block(
    x: TowerRows,
    layout: TokenLayout,
    text: BlockWeights,
    image: BlockWeights,
    rope: Rope,
    order: str = "tower",
    backend: str | None = None,
    kv_cache: tuple[Tensor, Tensor] | None = None,
    recompute: str = "none",
) -> TowerRows:
    """One decoder layer of two towers with shared attention (LMFusion, equations 7-12, with Llama's residuals).

    x: [N, d] in tower order, or the pair ([num_text, d_text], [num_image, d_image]); with `order="sequence"` [N, d] in
    sequence order, for a model that does not know about towers. The result has the form of `x`.
    text, image: weights in the dtype of `x`. rope: cos, sin from `rope_tables`. backend: None (choose), "native",
    "reference", or the name of an attention kernel. kv_cache: with a cached layout, the key and value buffers
    [num_keys, H_kv, D], started from zeros and written in place; for inference only. recompute: "none", or what the
    backward recomputes instead of keeping it: "ffn" (gate and up) or "layer" (everything except the input). Gradients
    are the same. The reference backend keeps everything. torch.autocast has no effect: rows and weights in bfloat16 are
    computed in bfloat16.

    Weights that do not require a gradient get none, and the constant tokens of the layout take no part in the backward:
    the gradient of `x` is zero there. Raises ValueError for mismatched shapes, dtypes or devices, for a layout with
    constant tokens together with trainable text weights, and for a backend or kernel that cannot run.
    """
    if order not in ("tower", "sequence"):
        raise ValueError(f"order must be 'tower' or 'sequence', got {order!r}")
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")
    if order == "sequence" and not isinstance(x, Tensor):
        raise ValueError("order='sequence' takes one tensor; rows of two widths have no common sequence order")
    if kv_cache is None and is_tracing():
        y = _traced(x, layout, text, image, rope, order, backend, recompute)
        if y is not None:
            return y
    if isinstance(x, Tensor) and order == "sequence":
        rows = layout.to_tower_order(x)
        moved = routed_block(rows, layout, text, image, rope, "tower", backend, kv_cache, recompute)
        assert isinstance(moved, Tensor)
        return layout.to_sequence_order(moved)
    x_text, x_image = split_towers(x, layout)
    _check_counts(x_text, layout, text, rope, kv_cache)
    _check_weights(x_text, x_image, text, image, rope)
    needs_grad = _needs_grad(x_text, x_image, text, image)
    if kv_cache is not None:
        _check_cache(kv_cache, layout, x_text, text, rope, needs_grad)
    device_type = "cpu" if x_text.is_meta else x_text.device.type  # there is no autocast for meta tensors
    with torch.autocast(device_type, enabled=False):
        if choose_backend(backend, x_text, x_image, others=(*rope, *_weights_of(text, image))) == "reference":
            return reference.routed_block(x, layout, text, image, rope, "tower", kv_cache)
        call = block_forward.Call(
            layout, text, image, rope,
            block_forward.choose_attention(backend, x_text, layout, text, rope, needs_grad),
            choose_ffn(
                (x_text, x_image), (text.gate_up_proj, image.gate_up_proj), needs_grad and recompute == "none"
            ),
            recompute,
        )  # fmt: skip
        if needs_grad:
            return block_backward.apply(call, x)
        with _below_autograd():
            return block_forward.forward(call, x, kv_cache, keep=False)[0]


def _traced(
    x: TowerRows,
    layout: TokenLayout,
    text: BlockWeights,
    image: BlockWeights,
    rope: Rope,
    order: str,
    backend: str | None,
    recompute: str,
) -> TowerRows | None:
    """The block as one op, for a graph; None if the reference has to run. Reads no count of the layout."""
    rows = [x] if isinstance(x, Tensor) else list(x)
    _check_weights(rows[0], rows[-1], text, image, rope)
    _check_is_cached(layout, None)
    if choose_backend(backend, *rows, others=(*rope, *_weights_of(text, image))) == "reference":
        return None
    needs_grad = _needs_grad(rows[0], rows[-1], text, image)
    return block_op.apply(x, layout, text, image, rope, order, backend, recompute, needs_grad)


def _below_autograd() -> AbstractContextManager[Any]:
    """Call ops without their autograd formulas, which are Python and cost more than a small op.

    Unlike in torch's inference mode, the results are ordinary tensors.
    """
    return nullcontext() if torch.compiler.is_compiling() else torch._C._AutoDispatchBelowAutograd()


def _needs_grad(x_text: Tensor, x_image: Tensor, text: BlockWeights, image: BlockWeights) -> bool:
    tensors = (x_text, x_image, *_weights_of(text, image))
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _weights_of(text: BlockWeights, image: BlockWeights) -> list[Tensor | None]:
    return [getattr(tower, name) for tower in (text, image) for name in _WEIGHT_NAMES]


def _check_counts(
    x: Tensor, layout: TokenLayout, text: BlockWeights, rope: Rope, kv_cache: tuple[Tensor, Tensor] | None
) -> None:
    """Raise ValueError unless the tables have one row per token, text weights are frozen if there are constant tokens,
    and a cached layout has a cache."""
    check_rope(rope[0], rope[1], layout, x)
    _check_is_cached(layout, kv_cache)
    trained = [n for n in _WEIGHT_NAMES if (w := getattr(text, n)) is not None and w.requires_grad]
    if trained and torch.is_grad_enabled():
        block_op.check_frozen(layout, trained[0])


def _check_is_cached(layout: TokenLayout, kv_cache: tuple[Tensor, Tensor] | None) -> None:
    if layout.is_cached != (kv_cache is not None):
        raise ValueError(
            "a layout with cached_lengths needs kv_cache, and kv_cache needs such a layout; give both or neither"
        )


def _check_weights(x_text: Tensor, x_image: Tensor, text: BlockWeights, image: BlockWeights, rope: Rope) -> None:
    """Raise ValueError unless the weights fit each other, the width of the rows and the head size."""
    head_dim = 2 * rope[0].shape[-1]
    qkv_width, out_width = text.qkv_proj.shape[0], text.o_proj.shape[-1]
    num_kv_rows = qkv_width - out_width
    if out_width % head_dim or num_kv_rows <= 0 or num_kv_rows % (2 * head_dim) or 2 * out_width % num_kv_rows:
        raise ValueError(
            f"text.o_proj and text.qkv_proj must divide into H query and 2 H_kv key and value heads of {head_dim}, "
            f"rope's size, with H a multiple of H_kv, got {tuple(text.o_proj.shape)} and {tuple(text.qkv_proj.shape)}"
        )
    if image.qkv_proj.shape[0] != qkv_width or image.o_proj.shape[-1] != out_width:
        raise ValueError(
            "the towers must have equally many heads, since they share their attention, got qkv_proj with "
            f"{qkv_width} rows in the text tower and {image.qkv_proj.shape[0]} in the image tower"
        )
    if text.eps != image.eps:
        raise ValueError(f"eps must be the same in both towers, got {text.eps} (text) and {image.eps} (image)")
    for name, x, weights in (("text", x_text, text), ("image", x_image, image)):
        if x.dim() != 2:
            raise ValueError(f"{name} rows must be [rows, width], got shape {tuple(x.shape)}")
        width, intermediate = x.shape[1], weights.down_proj.shape[-1]
        shapes = {
            "input_layernorm": (width,),
            "qkv_proj": (qkv_width, width),
            "o_proj": (width, out_width),
            "post_attention_layernorm": (width,),
            "gate_up_proj": (2 * intermediate, width),
            "down_proj": (width, intermediate),
            "qkv_bias": (qkv_width,),
            "q_norm": (head_dim,),
            "k_norm": (head_dim,),
        }
        for weight_name, shape in shapes.items():
            check_weight(getattr(weights, weight_name), shape, x, f"{name}.{weight_name}")


def _check_cache(
    kv_cache: tuple[Tensor, Tensor], layout: TokenLayout, x: Tensor, text: BlockWeights, rope: Rope, needs_grad: bool
) -> None:
    head_dim = 2 * rope[0].shape[-1]
    num_kv_heads = (text.qkv_proj.shape[0] - text.o_proj.shape[-1]) // (2 * head_dim)
    for name, cache in zip(("keys", "values"), kv_cache, strict=True):
        check_weight(cache, (layout.num_keys, num_kv_heads, head_dim), x, f"kv_cache {name}")
    if needs_grad:
        raise ValueError("a block with kv_cache has no backward, and an input requires a gradient; use torch.no_grad()")
