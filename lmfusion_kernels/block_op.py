"""The block as one op, which torch.compile, torch.export and make_fx see in place of its kernels.

A graph with the kernels in it would depend on the counts of every batch: torch.compile makes another graph for each
count that is 0 or 1. This op hides them in two tensors (`TokenLayout.as_two_tensors`). A graph depends on the number
of rows alone, and where gradients are recorded on two counts more, which give what is kept its shape. The kernels of
attention are chosen when the op runs. What it computes is that of `block_forward` and `block_backward`, to the bit.

Beside what the block keeps without tracing, the op keeps its rows, the constant ones included.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmfusion_kernels import block_backward, block_forward
from lmfusion_kernels.block_forward import Activations, Call
from lmfusion_kernels.checks import check_rope
from lmfusion_kernels.ffn import choose_ffn
from lmfusion_kernels.layout import BufferedLayout, TokenLayout
from lmfusion_kernels.transforms import NoSecondDerivative
from lmfusion_kernels.weights import BlockWeights, Rope, Rows, split_towers

_NAMES = block_backward.WEIGHT_NAMES

_KEPT = ("k", "v", "q", "out", "lse", "rstd_in", "middle_live", "middle_image", "rstd_middle")
_KEPT_BY_MODE = {"none": (*_KEPT, "gate_up_live", "gate_up_image"), "ffn": _KEPT, "layer": ("k", "v")}


class Traced(NamedTuple):
    """What the op gets but its rows and weights. Every field is an argument of the op, under the same name."""

    buffer: Tensor
    numbers: Tensor
    num_text: int
    """Like num_live, for the shapes of what is kept; 0 where nothing is."""
    num_live: int
    present: list[int]
    """Which of the weights are there: their places among those of the text tower, then those of the image tower."""
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
    x: Rows,
    layout: TokenLayout,
    text: BlockWeights,
    image: BlockWeights,
    rope: Rope,
    order: str,
    backend: str | None,
    recompute: str,
    needs_grad: bool,
) -> Rows:
    """`routed_block` as one op. The arguments have been checked but for what depends on counts."""
    weights, present = [], []
    for i, weight in enumerate(getattr(tower, name) for tower in (text, image) for name in _NAMES):
        if weight is not None:
            weights.append(weight)
            present.append(i)
    trained = [name for name in _NAMES if (weight := getattr(text, name)) is not None and weight.requires_grad]
    counts = (layout.num_text, layout.num_live) if needs_grad or torch.compiler.is_exporting() else (0, 0)
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
_library = torch.library.Library("lmfusion", "FRAGMENT")
_library.define(f"routed_block(Tensor[] x, Tensor[] weights, {_ARGUMENTS}) -> Tensor[]")
# Returns the result and what its backward reads.
_library.define(f"routed_block_kept(Tensor[] x, Tensor[] weights, {_ARGUMENTS}) -> Tensor[]")
# needs: by tensor of x, then by weight. Returns the gradients that are needed.
_library.define(
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
            results += _kept_tensors(call, saved)
    return [result.contiguous() for result in results]


def _in_tower_order(x: list[Tensor], layout: TokenLayout, traced: Traced) -> Rows:
    if traced.order == "sequence":
        return layout.to_tower_order(x[0])
    return x[0] if len(x) == 1 else (x[0], x[1])


def _call(x: Rows, layout: TokenLayout, weights: list[Tensor], traced: Traced, keep: bool) -> Call:
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


def _kept_names(traced_recompute: str, has_qk_norm: bool) -> tuple[str, ...]:
    names = _KEPT_BY_MODE[traced_recompute]
    return (*names, "qkv_live", "qkv_image") if has_qk_norm and traced_recompute != "layer" else names


def _kept_tensors(call: Call, saved: Activations) -> list[Tensor]:
    names = _kept_names(call.recompute, call.has_qk_norm)
    if call.recompute == "layer" and saved.k is None:  # no constant rows
        shape = (0, call.num_kv_heads, 2 * call.rope[0].shape[-1])
        return [saved.x_image.new_empty(shape) for _ in names]
    return [block_forward.present(getattr(saved, name)) for name in names]


def _backward(
    dy: list[Tensor], x: list[Tensor], weights: list[Tensor], kept: list[Tensor], needs: list[bool], *arguments: Any
) -> list[Tensor]:
    traced = Traced(*arguments)
    with torch.autocast(x[0].device.type, enabled=False):
        layout = BufferedLayout(traced.buffer, traced.numbers)
        rows = _in_tower_order(x, layout, traced)
        call = _call(rows, layout, weights, traced, keep=True)
        x_text, x_image = split_towers(rows, layout)
        names = _kept_names(call.recompute, call.has_qk_norm)
        saved = Activations(x_text[layout.num_constant :], x_image, **dict(zip(names, kept, strict=True)))
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
    """Raise ValueError if a text weight is trained beside constant rows."""
    if layout.num_constant and trained:
        raise ValueError(
            f"text.{trained} requires a gradient, but the layout takes the text tower for frozen; build it "
            "with frozen_text=False, or call requires_grad_(False) on the text weights"
        )


def _fake_forward(x: list[Tensor], weights: list[Tensor], *arguments: Any) -> list[Tensor]:
    return [rows.new_empty(rows.shape) for rows in x]


def _fake_forward_kept(x: list[Tensor], weights: list[Tensor], *arguments: Any) -> list[Tensor]:
    traced = Traced(*arguments)
    by_name = {i: weight for i, weight in zip(traced.present, weights, strict=True) if i < len(_NAMES)}
    qkv_proj, o_proj, gate_up = (by_name[_NAMES.index(name)] for name in ("qkv_proj", "o_proj", "gate_up_proj"))
    image_gate_up = weights[traced.present.index(len(_NAMES) + _NAMES.index("gate_up_proj"))]
    norms = {_NAMES.index(name) + first for name in ("q_norm", "k_norm") for first in (0, len(_NAMES))}
    num_rows = sum(rows.shape[0] for rows in x)
    num_live, num_image = traced.num_live, num_rows - traced.num_text
    num_constant = traced.num_text - num_live
    num_active = num_rows - num_constant
    head_dim = 2 * traced.cos.shape[1]
    num_heads = o_proj.shape[1] // head_dim
    num_kv_heads = (qkv_proj.shape[0] // head_dim - num_heads) // 2
    num_keys = num_constant if traced.recompute == "layer" else num_rows
    shapes = {
        "k": (num_keys, num_kv_heads, head_dim),
        "v": (num_keys, num_kv_heads, head_dim),
        "q": (num_active, num_heads, head_dim),
        "out": (num_active, num_heads, head_dim),
        "lse": (num_heads, num_active),
        "rstd_in": (num_rows,),
        "middle_live": (num_live, x[0].shape[1]),
        "middle_image": (num_image, x[-1].shape[1]),
        "rstd_middle": (num_rows,),
        "gate_up_live": (num_live, gate_up.shape[0]),
        "gate_up_image": (num_image, image_gate_up.shape[0]),
        "qkv_live": (num_live, qkv_proj.shape[0]),
        "qkv_image": (num_image, qkv_proj.shape[0]),
    }
    names = _kept_names(traced.recompute, bool(norms & set(traced.present)))
    floats = ("lse", "rstd_in", "rstd_middle")
    return [rows.new_empty(rows.shape) for rows in x] + [
        x[0].new_empty(shapes[name], dtype=torch.float32 if name in floats else x[0].dtype) for name in names
    ]


def _fake_backward(
    dy: list[Tensor], x: list[Tensor], weights: list[Tensor], kept: list[Tensor], needs: list[bool], *arguments: Any
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor, need in zip([*x, *weights], needs, strict=True) if need]


class _RoutedBlockOp(torch.autograd.Function):
    """The op with a backward, in which the op runs that also returns what it keeps."""

    @staticmethod
    def forward(ctx: Any, num_rows: int, traced: Traced, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, weights = list(tensors[:num_rows]), list(tensors[num_rows:])
        with torch._C._AutoDispatchBelowAutograd():
            results = torch.ops.lmfusion.routed_block_kept(x, weights, *traced)
        kept = results[num_rows:]
        ctx.sizes = (num_rows, len(weights), len(kept))
        ctx.numbers = traced._replace(buffer=None, numbers=None, cos=None, sin=None)
        ctx.save_for_backward(*tensors, *kept, traced.buffer, traced.numbers, traced.cos, traced.sin)
        return tuple(results[:num_rows])

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> Any:
        tensors = list(ctx.saved_tensors)
        num_rows, num_weights, _ = ctx.sizes
        *kept, buffer, numbers, cos, sin = tensors[num_rows + num_weights :]
        x, weights = tensors[:num_rows], tensors[num_rows : num_rows + num_weights]
        traced = ctx.numbers._replace(buffer=buffer, numbers=numbers, cos=cos, sin=sin)
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
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lmfusion::{_name}", _fake, lib=_library)
_library.impl("routed_block", _autograd, "Autograd")
