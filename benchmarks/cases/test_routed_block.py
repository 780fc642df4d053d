"""A whole two-tower layer beside other ways to route, for every share of text.

Frozen text is LMFusion's training: text rows before an image have no backward. "all trained" is BAGEL's training.
"""

import functools

import pytest

from benchmarks.baselines.both_towers import both_towers
from benchmarks.baselines.cosmos3 import cosmos3
from benchmarks.baselines.dense_llama import dense_llama
from benchmarks.baselines.gather_scatter import gather_scatter
from benchmarks.baselines.slabs import slabs
from benchmarks.harness import shapes
from benchmarks.harness.compare import Contestant, Row
from benchmarks.harness.layer import LayerCase, contestant, frozen, layer_flops, make_case, routed_block

MODES = {
    "all trained": (shapes.half_caption, False),
    "frozen text, caption first": (shapes.half_caption, True),
    "frozen text, image first": (shapes.image_first, True),
    "frozen text, interleaved": (shapes.interleaved, True),
}
BRIEF_MODES = ("all trained", "frozen text, caption first")
"""The cases in which shapes other than the main one are measured."""


def contestants_of(case: LayerCase, backward: bool) -> dict[str, Contestant]:
    return {
        "ours": contestant(case, routed_block, backward, mask=case.build_layout),
        "slabs, compiled": contestant(case, lambda c: slabs(c, is_compiled=True), backward, is_compiled=True),
        "slabs, eager": contestant(case, lambda c: slabs(c, is_compiled=False), backward),
        "gather / scatter": contestant(case, gather_scatter, backward),
        "both towers on all tokens": contestant(case, both_towers, backward),
        "one dense Llama layer, no routing": contestant(case, dense_llama, backward, is_floor=True),
    }


@pytest.mark.parametrize(
    ("shape", "percent", "dtype"), shapes.by_dtype(shapes.FORWARD_CASES, lambda _, percent: percent == 50)
)
def test_forward(record, device, shape, percent, dtype):
    case = frozen(make_case(shape, shapes.share_of_text(shapes.NUM_TOKENS, percent), dtype, device, frozen_text=True))
    bars = {"slabs, compiled": 0.95} if percent == 50 else {}
    row = Row("routed_block", f"{percent} % text", dtype, "forward", shape.name, case.layout.num_tokens,
              flops=layer_flops(case, backward=False), bars=bars)  # fmt: skip
    record(row, contestants_of(case, backward=False))


@pytest.mark.parametrize(
    ("shape", "mode", "dtype"),
    shapes.by_dtype(
        [(s, m) for s in shapes.SHAPES for m in MODES if s == shapes.MAIN or m in BRIEF_MODES],
        lambda _, mode: mode in BRIEF_MODES,
    ),
)
def test_forward_backward(record, device, shape, mode, dtype):
    documents, is_frozen = MODES[mode]
    case = make_case(shape, documents(shapes.NUM_TOKENS), dtype, device, is_frozen)
    contestants = contestants_of(case, backward=True)
    bars = {"gather / scatter": 0.8}
    if is_frozen and case.layout.num_live == 0:
        trained = make_case(shape, documents(shapes.NUM_TOKENS), dtype, device, frozen_text=False)
        contestants["ours, text trained"] = contestant(trained, routed_block, backward=True, is_floor=True)
        bars["ours, text trained"] = 0.7
    for recompute in ("ffn", "layer"):
        make = functools.partial(routed_block, recompute=recompute)
        contestants[f"ours, recompute={recompute}"] = contestant(case, make, backward=True)
    row = Row("routed_block", mode, dtype, "forward+backward", shape.name, case.layout.num_tokens,
              flops=layer_flops(case, backward=True), bars=bars)  # fmt: skip
    record(row, contestants)


@pytest.mark.parametrize("dtype", shapes.DTYPES, ids=shapes.dtype_id)
@pytest.mark.parametrize("is_frozen", [True, False], ids=["frozen text", "all trained"])
def test_beside_cosmos3(record, device, is_frozen, dtype):
    """One document of text and one image, the only batch that diffusers' layer supports. It always has QK norms."""
    shape, half = shapes.with_qk_norm(shapes.MAIN), shapes.NUM_TOKENS // 2
    case = make_case(shape, [[("text", half), ("image", half)]], dtype, device, is_frozen)
    contestants = {
        "ours": contestant(case, routed_block, backward=True, mask=case.build_layout),
        "diffusers' Cosmos3 layer": contestant(case, cosmos3, backward=True),
    }
    name = f"one document, QK norm, {'frozen text' if is_frozen else 'all trained'}"
    bars = {"diffusers' Cosmos3 layer": 0.85}
    row = Row("routed_block", name, dtype, "forward+backward", shape.name, case.layout.num_tokens,
              flops=layer_flops(case, backward=True), bars=bars)  # fmt: skip
    record(row, contestants)
