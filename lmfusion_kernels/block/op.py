"""The block as one op, which torch.compile, torch.export and make_fx see in place of its kernels.

A graph with the kernels in it would depend on the counts of every batch: torch.compile makes another graph for each
count that is 0 or 1. This op hides them in two tensors (`TokenLayout.as_two_tensors`). A graph depends on the number
of rows only, and, where gradients are recorded, on two more counts that give the shapes of what is kept. The attention
kernel is chosen when the op runs. The op computes the same bits as `block_forward` and `block_backward`.

In addition to what an untraced block keeps, the op keeps its input rows, including the constant ones.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmfusion_kernels.block import backward as block_backward
from lmfusion_kernels.block import forward as block_forward
from lmfusion_kernels.block.forward import Activations, Call
from lmfusion_kernels.block.weights import BlockWeights, Rope, TowerRows, split_towers
from lmfusion_kernels.layout.token_layout import BufferedLayout, TokenLayout
from lmfusion_kernels.ops.gate_up_swiglu import choose_ffn
from lmfusion_kernels.runtime.library import refuse_second_derivative
from lmfusion_kernels.runtime.transforms import NoSecondDerivative
from lmfusion_kernels.runtime.validation import check_rope

_NAMES = block_backward.WEIGHT_NAMES

_NORM_PLACES = tuple(_NAMES.index(name) for name in ("q_norm", "k_norm"))
_TENSORS = ("buffer", "numbers", "cos", "sin")
_UNKNOWN = -1
_LEAST = 2
_FLOAT32 = ("lse", "rstd_in", "rstd_post_attention")


class Traced(NamedTuple):
    """The op's arguments apart from rows and weights, under their names in the op's schema."""

    buffer: Tensor
    numbers: Tensor
    num_text: int
    """Like num_live, for the shapes of what is kept. _UNKNOWN where nothing is kept, since AOTInductor accepts no
    numbers that vary."""
    num_live: int
    present: list[int]
    """The weights that are given: their indices among the weights of the text tower, then of the image tower."""
    cos: Tensor
    sin: Tensor
    eps: float
    order: str
    backend: str
    """"" for None"""
    recompute: str
    trained: str
    """The name of a text weight that requires a gradient; "" if none does."""


def apply(
    x: TowerRows,
    layout: TokenLayout,
    text: BlockWeights,
    image: BlockWeights,
    rope: Rope,
    order: str,
    backend: str | None,
    recompute: str,
    needs_grad: bool,
) -> TowerRows:
    """`routed_block` as one op. The arguments have been checked, except for what depends on counts."""
    weights, present = [], []
    for i, weight in enumerate(getattr(tower, name) for tower in (text, image) for name in _NAMES):
        if weight is not None:
            weights.append(weight)
            present.append(i)
    trained = [name for name in _NAMES if (weight := getattr(text, name)) is not None and weight.requires_grad]
    counts = (layout.num_text, layout.num_live) if needs_grad else (_UNKNOWN, _UNKNOWN)
    cos, sin = rope
    traced = Traced(
        *layout.as_two_tensors(), *counts, present, cos, sin, text.eps, order, backend or "", recompute,
        trained[0] if trained and needs_grad else "",
    )  # fmt: skip
    rows = [x] if isinstance(x, Tensor) else list(x)
    y = torch.ops.lmfusion.routed_block(rows, weights, *traced)
    return y[0] if isinstance(x, Tensor) else (y[0], y[1])


_ARGUMENTS = (
    "Tensor buffer, Tensor numbers, SymInt num_text, SymInt num_live, int[] present, Tensor cos, Tensor sin, "
    "float eps, str order, str backend, str recompute, str trained"
)
library = torch.library.Library("lmfusion", "FRAGMENT")
library.define(f"routed_block(Tensor[] x, Tensor[] weights, {_ARGUMENTS}) -> Tensor[]")
# Returns the result and what its backward reads.
library.define(f"routed_block_kept(Tensor[] x, Tensor[] weights, {_ARGUMENTS}) -> Tensor[]")
# needs: by tensor of x, then by weight. Returns the gradients that are needed.
library.define(
    f"routed_block_backward(Tensor[] dy, Tensor[] x, Tensor[] weights, Tensor[] kept, bool[] needs, {_ARGUMENTS}) "
    "-> Tensor[]"
)


def _forward(x: list[Tensor], weights: list[Tensor], *arguments: Any) -> list[Tensor]:
    return _run(x, weights, Traced(*arguments), keep=False)


def _forward_kept(x: list[Tensor], weights: list[Tensor], *arguments: Any) -> list[Tensor]:
    return _run(x, weights, Traced(*arguments), keep=True)


def _run(x: list[Tensor], weights: list[Tensor], traced: Traced, keep: bool) -> list[Tensor]:
    with torch.autocast(x[0].device.type, enabled=False):
        layout = BufferedLayout(traced.buffer, traced.numbers)
        rows = _in_tower_order(x, layout, traced)
        call = _call(rows, layout, weights, traced, keep)
        y, saved = block_forward.forward(call, rows, None, keep, keep_rows=False)
        results = [y] if isinstance(y, Tensor) else list(y)
        if traced.order == "sequence":
            results = [layout.to_sequence_order(results[0])]
        if saved is not None:
            kept = [getattr(saved, name) for name in _kept_shapes(x, weights, traced, 0, 0, 0)]
            results += [_flat(tensor, results[0]) for tensor in kept]
    return [result.contiguous() for result in results]


def _in_tower_order(x: list[Tensor], layout: TokenLayout, traced: Traced) -> TowerRows:
    if traced.order == "sequence":
        return layout.to_tower_order(x[0])
    return x[0] if len(x) == 1 else (x[0], x[1])


def _call(x: TowerRows, layout: TokenLayout, weights: list[Tensor], traced: Traced, keep: bool) -> Call:
    """Checks what depends on counts, and chooses the kernels."""
    by_place: dict[int, Tensor] = dict(zip(traced.present, weights, strict=True))
    text, image = (
        BlockWeights(**{name: by_place.get(first + i) for i, name in enumerate(_NAMES)}, eps=traced.eps)  # type: ignore[arg-type]
        for first in (0, len(_NAMES))
    )
    rope, rows = (traced.cos, traced.sin), split_towers(x, layout)
    check_rope(*rope, layout, rows[0])
    check_frozen(layout, traced.trained)
    kernel = block_forward.choose_attention(traced.backend or None, rows[0], layout, text, rope, keep)
    ffn = choose_ffn(rows, (text.gate_up_proj, image.gate_up_proj), keep and traced.recompute == "none")
    return Call(layout, text, image, rope, kernel, ffn, traced.recompute)


def _flat(tensor: Tensor | None, like: Tensor) -> Tensor:
    """A kept tensor as the op returns it: flat, with at least two elements, since graphs are specialised to sizes 0
    and 1."""
    if tensor is None:
        return like.new_empty(_LEAST)
    flat = tensor.reshape(-1)
    missing = _LEAST - flat.numel()
    return torch.nn.functional.pad(flat, (0, missing)) if missing > 0 else flat


def _kept_shapes(
    x: list[Tensor], weights: list[Tensor], traced: Traced, num_rows: int, num_text: int, num_live: int
) -> dict[str, tuple[int, ...]]:
    """The fields of `Activations` that are kept, in order, and their shapes."""
    here = dict(zip(traced.present, weights, strict=True))
    qkv_width, gate_up_width, image_gate_up_width = (
        here[first + _NAMES.index(name)].shape[0]
        for first, name in ((0, "qkv_proj"), (0, "gate_up_proj"), (len(_NAMES), "gate_up_proj"))
    )
    head_dim = 2 * traced.cos.shape[1]
    num_heads = here[_NAMES.index("o_proj")].shape[1] // head_dim
    num_kv_heads = (qkv_width // head_dim - num_heads) // 2
    num_image, num_constant = num_rows - num_text, num_text - num_live
    num_active = num_rows - num_constant
    keys = (num_constant if traced.recompute == "layer" else num_rows, num_kv_heads, head_dim)
    queries = (num_active, num_heads, head_dim)
    shapes: dict[str, tuple[int, ...]] = {"k": keys, "v": keys}
    if traced.recompute == "layer":
        return shapes
    shapes |= {"q": queries, "out": queries, "lse": (num_heads, num_active)}
    shapes |= {"rstd_in": (num_rows,), "rstd_post_attention": (num_rows,)}
    shapes |= {"post_attention_live": (num_live, x[0].shape[1]), "post_attention_image": (num_image, x[-1].shape[1])}
    if traced.recompute == "none":
        shapes |= {"gate_up_live": (num_live, gate_up_width), "gate_up_image": (num_image, image_gate_up_width)}
    if any(place % len(_NAMES) in _NORM_PLACES for place in traced.present):
        shapes |= {"qkv_live": (num_live, qkv_width), "qkv_image": (num_image, qkv_width)}
    return shapes


def _backward(
    dy: list[Tensor], x: list[Tensor], weights: list[Tensor], kept: list[Tensor], needs: list[bool], *arguments: Any
) -> list[Tensor]:
    traced = Traced(*arguments)
    with torch.autocast(x[0].device.type, enabled=False):
        layout = BufferedLayout(traced.buffer, traced.numbers)
        rows = _in_tower_order(x, layout, traced)
        call = _call(rows, layout, weights, traced, keep=True)
        x_text, x_image = split_towers(rows, layout)
        shapes = _kept_shapes(x, weights, traced, layout.num_tokens, layout.num_text, layout.num_live)
        fields = {
            name: flat[: math.prod(shape)].view(shape) for (name, shape), flat in zip(shapes.items(), kept, strict=True)
        }
        saved = Activations(x_text[layout.num_constant :], x_image, **fields)
        if call.recompute != "none":
            saved = block_forward.complete(call, saved)
        is_needed = dict(zip(traced.present, needs[len(x) :], strict=True))
        needs_rows = [needs[0], False, False] if len(x) == 1 else [False, *needs[:2]]
        needs_weights = [is_needed.get(i, False) for i in range(2 * len(_NAMES))]
        if traced.order == "sequence":
            dy = [layout.to_tower_order(dy[0])]
        grads = block_backward.backward(call, saved, (dy[0], dy[1] if len(x) == 2 else None), needs_rows, needs_weights)
        results = [grad for grad in grads if grad is not None]
        if traced.order == "sequence" and needs[0]:
            results[0] = layout.to_sequence_order(results[0])
    return [result.contiguous() for result in results]


def check_frozen(layout: TokenLayout, trained: str) -> None:
    """Raise ValueError if a text weight is trained although there are constant tokens."""
    if layout.num_constant and trained:
        raise ValueError(
            f"text.{trained} must not require a gradient, since the layout assumes a frozen text tower; build it "
            "with frozen_text=False, or call requires_grad_(False) on the text weights"
        )


def _fake_forward(x: list[Tensor], weights: list[Tensor], *arguments: Any) -> list[Tensor]:
    return [rows.new_empty(rows.shape) for rows in x]


def _fake_forward_kept(x: list[Tensor], weights: list[Tensor], *arguments: Any) -> list[Tensor]:
    traced = Traced(*arguments)
    if isinstance(traced.num_text, int) and traced.num_text == _UNKNOWN:
        raise RuntimeError(
            "this graph of a block was made without gradients and cannot be traced again with them; make it with "
            "gradients on (no torch.no_grad(), and rows or weights that require one)"
        )
    num_rows = sum(rows.shape[0] for rows in x)
    shapes = _kept_shapes(x, weights, traced, num_rows, traced.num_text, traced.num_live)
    return [rows.new_empty(rows.shape) for rows in x] + [
        x[0].new_empty(torch.sym_max(math.prod(shape), _LEAST), dtype=torch.float32 if name in _FLOAT32 else x[0].dtype)
        for name, shape in shapes.items()
    ]


def _fake_backward(
    dy: list[Tensor], x: list[Tensor], weights: list[Tensor], kept: list[Tensor], needs: list[bool], *arguments: Any
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor, need in zip([*x, *weights], needs, strict=True) if need]


class _RoutedBlockOp(torch.autograd.Function):
    """The op with a backward: runs the variant that also returns what the backward reads."""

    @staticmethod
    def forward(ctx: Any, num_rows: int, traced: Traced, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, weights = list(tensors[:num_rows]), list(tensors[num_rows:])
        with torch._C._AutoDispatchBelowAutograd():
            results = torch.ops.lmfusion.routed_block_kept(x, weights, *traced)
        kept = results[num_rows:]
        ctx.sizes = num_rows, len(weights)
        ctx.traced = traced._asdict() | dict.fromkeys(_TENSORS)
        ctx.save_for_backward(*tensors, *kept, traced.buffer, traced.numbers, traced.cos, traced.sin)
        return tuple(results[:num_rows])

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> Any:
        tensors = list(ctx.saved_tensors)
        num_rows, num_weights = ctx.sizes
        *kept, buffer, numbers, cos, sin = tensors[num_rows + num_weights :]
        x, weights = tensors[:num_rows], tensors[num_rows : num_rows + num_weights]
        traced = Traced(**ctx.traced | dict(zip(_TENSORS, (buffer, numbers, cos, sin), strict=True)))
        needs = list(ctx.needs_input_grad[2:])
        with torch.no_grad():
            found = iter(torch.ops.lmfusion.routed_block_backward(list(dy), x, weights, kept, needs, *traced))
            grads = [next(found) if need else None for need in needs]
        if torch.is_grad_enabled():
            grads = NoSecondDerivative.apply("routed_block", len(grads), *grads, *dy, *x, *weights)
        return None, None, *grads


def _autograd(x: list[Tensor], weights: list[Tensor], *arguments: Any) -> list[Tensor]:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*x, *weights)):
        return list(_RoutedBlockOp.apply(len(x), Traced(*arguments), *x, *weights))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.lmfusion.routed_block(x, weights, *arguments)


for _name, _function, _fake in (
    ("routed_block", _forward, _fake_forward),
    ("routed_block_kept", _forward_kept, _fake_forward_kept),
    ("routed_block_backward", _backward, _fake_backward),
):
    library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lmfusion::{_name}", _fake, lib=library)
library.impl("routed_block", _autograd, "Autograd")
for _name in (
    "routed_block_kept",
    "routed_block_backward",
):  # a graph that make_fx traced with gradients calls them directly
    refuse_second_derivative(_name)
