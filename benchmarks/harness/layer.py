"""Cases of whole layers: weights of two towers, rows, and one step of any layer function.

Every contestant gets the same weights and, for a seed, the same rows, in the order that its layer uses.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

import lmfusion_kernels as lk
from benchmarks.harness.compare import Contestant
from benchmarks.harness.shapes import Documents, LayerShape
from lmfusion_kernels.block.weights import Rope


@dataclass(frozen=True)
class LayerCase:
    """One layer and one packed batch."""

    shape: LayerShape
    dtype: torch.dtype
    layout: lk.TokenLayout
    rope: Rope
    text: lk.BlockWeights
    image: lk.BlockWeights
    build_layout: Callable[[], lk.TokenLayout]
    """Builds the layout again, as every new batch does."""

    @property
    def device(self) -> torch.device:
        return self.layout.device

    @property
    def weights(self) -> list[Tensor]:
        return [*weights_of(self.text), *weights_of(self.image)]

    def rows(self, seed: int) -> tuple[Tensor, Tensor]:
        """Random rows of both towers; text rows require a gradient unless all of them are constant."""
        layout, width = self.layout, self.shape.hidden_size
        torch.manual_seed(seed)
        text, image = torch.randn(layout.num_tokens, width, device=self.device).to(self.dtype).split(
            [layout.num_text, layout.num_image]
        )  # fmt: skip
        return text.clone().requires_grad_(layout.num_live > 0), image.clone().requires_grad_()


def weights_of(tower: lk.BlockWeights) -> list[Tensor]:
    return [value for field in fields(tower) if isinstance(value := getattr(tower, field.name), Tensor)]


def random_tower(shape: LayerShape, dtype: torch.dtype, device: torch.device, requires_grad: bool) -> lk.BlockWeights:
    """Normal weights scaled so that rows keep their size; norms around one."""
    d, ffn, heads = shape.hidden_size, shape.intermediate_size, shape.num_heads * shape.head_dim

    def matrix(rows: int, columns: int) -> Tensor:
        weight = torch.randn(rows, columns, device=device, dtype=dtype) * columns**-0.5
        return weight.requires_grad_(requires_grad)

    def norm(width: int) -> Tensor:
        return (1 + 0.1 * torch.randn(width, device=device)).to(dtype).requires_grad_(requires_grad)

    return lk.BlockWeights(
        input_layernorm=norm(d),
        qkv_proj=matrix(shape.qkv_width, d),
        o_proj=matrix(d, heads),
        post_attention_layernorm=norm(d),
        gate_up_proj=matrix(2 * ffn, d),
        down_proj=matrix(d, ffn),
        qkv_bias=norm(shape.qkv_width) if shape.qkv_bias else None,
        q_norm=norm(shape.head_dim) if shape.qk_norm else None,
        k_norm=norm(shape.head_dim) if shape.qk_norm else None,
    )


def make_case(
    shape: LayerShape,
    documents: Documents,
    dtype: torch.dtype,
    device: torch.device,
    frozen_text: bool,
    **cache: Any,
) -> LayerCase:
    """cache: cached_lengths, cache_starts and cache_slots of `TokenLayout.from_spans`."""
    torch.manual_seed(0)

    def build_layout() -> lk.TokenLayout:
        return lk.TokenLayout.from_spans(documents, frozen_text=frozen_text, device=device, **cache)

    layout = build_layout()
    inv_freq = 1e5 ** -torch.linspace(0, 1, shape.head_dim // 2, device=device)
    text = random_tower(shape, dtype, device, requires_grad=not frozen_text)
    image = random_tower(shape, dtype, device, requires_grad=True)
    return LayerCase(shape, dtype, layout, lk.rope_tables(layout.position, inv_freq), text, image, build_layout)


def cache_of(num_documents: int, cached_length: int, capacity: int) -> dict[str, Any]:
    """Arguments of `TokenLayout.from_spans` for equally long documents, each in `capacity` slots of a cache."""
    return {
        "cached_lengths": [cached_length] * num_documents,
        "cache_starts": [capacity * document for document in range(num_documents)],
        "cache_slots": capacity * num_documents,
    }


def frozen(case: LayerCase) -> LayerCase:
    """The same batch and weights, shared in memory, without gradients."""
    text, image = (
        replace(tower, **{f.name: v.detach() for f in fields(tower) if isinstance(v := getattr(tower, f.name), Tensor)})
        for tower in (case.text, case.image)
    )
    return replace(case, text=text, image=image)


@dataclass(frozen=True)
class Layer:
    """One way to compute a layer."""

    forward: Callable[..., Any]
    weights: Sequence[Tensor]
    """The weights whose gradients are computed if they require one: the case's, or copies."""
    order: str = "tower"
    """The order of its inputs and outputs. "tower": text rows and image rows; "joined": one tensor in tower order;
    "sequence": one tensor in sequence order. Rows have this order before the clock starts, as in a model of such
    layers. """


@dataclass(frozen=True)
class StepResult:
    """The results of a step, in the order of its layer."""

    order: str
    outputs: Sequence[Tensor]
    row_grads: Sequence[Tensor]


def contestant(case: LayerCase, make: Callable[[LayerCase], Layer], backward: bool, **options: Any) -> Contestant:
    """One step of a layer on rows of `case`: outputs, and with `backward` the gradients of rows and weights.

    The layer is made when the contestant is prepared, so that a failure is a line of its own. The outputs and the
    gradients of all rows are compared, except constant rows, for which ours computes no gradient.
    """

    def prepare(seed: int) -> Callable[[], StepResult]:
        layer = make(case)
        rows = _in_order(case, layer.order, case.rows(seed))
        dout = [dy.detach() for dy in _in_order(case, layer.order, case.rows(seed + 1000))]
        if not backward:

            @torch.no_grad()
            def infer() -> StepResult:
                return StepResult(layer.order, _as_tuple(layer.forward(*rows)), ())

            return infer
        wanted = [x for x in rows if x.requires_grad]
        leaves = [*wanted, *(weight for weight in layer.weights if weight.requires_grad)]

        def step() -> StepResult:
            outputs = _as_tuple(layer.forward(*rows))
            pairs = [(y, dy) for y, dy in zip(outputs, dout, strict=True) if y.requires_grad]
            grads = torch.autograd.grad([y for y, _ in pairs], leaves, [dy for _, dy in pairs], allow_unused=True)
            return StepResult(layer.order, outputs, grads[: len(wanted)])

        return step

    return Contestant(prepare, functools.partial(_results, case), **options)


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _in_order(case: LayerCase, order: str, rows: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """New leaves with these rows in the order of a layer."""
    if order == "tower":
        return rows
    joined = torch.cat(rows).detach()
    return ((joined if order == "joined" else joined[case.layout.sequence_to_tower.long()]).requires_grad_(),)


def _results(case: LayerCase, step: StepResult) -> list[Tensor]:
    """The tensors of a step that are compared, in tower order."""
    layout = case.layout

    def towers(parts: Sequence[Tensor]) -> list[Tensor]:
        if step.order == "tower":
            return list(parts)
        (rows,) = parts
        rows = rows[layout.tower_to_sequence.long()] if step.order == "sequence" else rows
        return list(rows.split([layout.num_text, layout.num_image]))

    grads = towers(step.row_grads) if step.row_grads else []
    live = [grads[0][layout.num_constant :]] if len(grads) == 2 and layout.num_live else []
    return [*towers(step.outputs), *live, *grads[-1:]]


def routed_block(case: LayerCase, **options: Any) -> Layer:
    """Our layer, with options of `lk.routed_block`."""

    def forward(x_text: Tensor, x_image: Tensor) -> Any:
        return lk.routed_block((x_text, x_image), case.layout, case.text, case.image, case.rope, **options)

    return Layer(forward, case.weights)


def layer_flops(case: LayerCase, backward: bool) -> float:
    """Useful FLOPs of a step.

    The forward of every row, a product for each input gradient, a product for each weight gradient if the tower is
    trained, and attention over the visible pairs.
    """
    layout, shape = case.layout, case.shape
    products = float(layout.num_tokens)
    if backward:
        text_is_trained = case.text.qkv_proj.requires_grad
        products += layout.num_live * (2 if text_is_trained else 1) + 2 * layout.num_image
    start, end = layout.key_start, layout.key_end
    area = int((end.long() - start.long()).sum())
    pairs = 4.0 * area
    if backward:  # dq, dk and dv of what is not constant, and the scores once more
        active = int((layout.active.key_end.long() - layout.active.key_start.long()).sum())
        seen = int((layout.active.query_end.long() - layout.active.query_start.long()).sum())
        pairs += 6.0 * active + 4.0 * seen
    return 2.0 * shape.num_parameters * products + pairs * shape.num_heads * shape.head_dim
