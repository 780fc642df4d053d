"""The cost of the fused block: kernels launched, bytes kept, FLOPs, and what each recompute mode saves."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lmfusion_kernels as lk
from lmfusion_kernels.block.routed_block import RECOMPUTE
from tests.kernels.block.test_routed_block import DOCUMENTS, HEAD_DIM, HEADS, KV_HEADS, make_block, make_inputs, run

WIDTH, FFN, IMAGE_FFN = 32, 48, 40  # of make_block
CAPTION_FIRST = [[("text", 9), ("marker", 1), ("image", 4), ("marker", 1)], [("text", 5), ("marker", 1), ("image", 4)]]
IMAGE_FIRST = [[("marker", 1), ("image", 4), ("marker", 1), ("text", 7)], [("image", 4), ("text", 3)]]

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"}
"""Ops that on CUDA make the host wait."""


class Launches(TorchDispatchMode):
    """Counts the kernels that ops would launch on a GPU, except attention and results without elements."""

    def __init__(self):
        super().__init__()
        self.by_op = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.by_op += [func._opname] * self.count(func, args, kwargs, result)
        return result

    @staticmethod
    def count(func, args, kwargs, result):
        name = func._opname
        assert name not in WAITS, f"{name} waits for the device"
        results = [t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, Tensor)]
        if func.is_view or name in ALLOCATIONS or name.startswith("hybrid_attention"):
            return 0
        if not any(t.numel() for t in results):
            return 0
        if name == "addmm":  # copies a matrix into the result first; a vector goes into the product's epilogue
            return 1 if args[0].dim() == 1 or kwargs.get("out") is args[0] else 2
        if name == "rms_norm_backward":  # partial sums of the weights' gradients are summed by another kernel
            return 2 if args[7] or args[8] else 1
        if name == "rope_reorder_backward":
            return 2 if args[15] or args[16] else 1
        return 1


def launches(documents, frozen_text, paired=True, recompute="none", **options):
    """Kernels outside attention of a forward and of its backward to every gradient there is."""
    block = make_block(frozen_text=frozen_text, **options)
    layout = lk.TokenLayout.from_spans(documents, frozen_text=frozen_text)
    x, rope = make_inputs(layout, torch.float32, paired=paired)
    rows = [t.requires_grad_() for t in (x if paired else (x,))]
    with Launches() as forward:
        y = block(x, layout, rope, recompute=recompute)
    ys = y if paired else (y,)
    inputs = [*rows, *(p for p in block.parameters() if p.requires_grad)]
    grads = [torch.ones_like(t) for t in ys]
    with Launches() as backward:
        torch.autograd.grad(ys, inputs, grads)
    return forward.by_op, backward.by_op


@pytest.mark.parametrize(
    ("documents", "frozen_text", "options", "num_forward", "num_backward"),
    [
        (DOCUMENTS, False, {}, 12, 22),
        (DOCUMENTS, False, {"paired": False}, 12, 23),
        (DOCUMENTS, False, {"qk_norm": True}, 12, 23),
        (DOCUMENTS, False, {"qkv_bias": True}, 12, 24),
        (DOCUMENTS, False, {"qkv_bias": True, "paired": False}, 12, 25),
        (IMAGE_FIRST, True, {}, 12, 18),
        (CAPTION_FIRST, True, {}, 13, 20),
        (CAPTION_FIRST, True, {"paired": False}, 13, 20),
        (CAPTION_FIRST, True, {"qk_norm": True}, 14, 21),
        (CAPTION_FIRST, True, {"qkv_bias": True}, 13, 21),
        ([[("image", 4)]], False, {}, 8, 18),  # zeros for the weights of the text tower
    ],
    ids=lambda value: str(value) if not isinstance(value, list) else "",
)
def test_launches_as_many_kernels_as_the_docstrings_say(documents, frozen_text, options, num_forward, num_backward):
    forward, backward = launches(documents, frozen_text, **options)
    assert len(forward) == num_forward, forward
    assert len(backward) == num_backward <= 25, backward


def test_recomputing_launches_no_more_than_what_it_computes_again():
    forward, backward = launches(DOCUMENTS, False)
    for mode, num_more in (("ffn", 3), ("layer", 9)):  # norm and two GEMMs; all but SwiGLU and the down projection
        forward_then, backward_then = launches(DOCUMENTS, False, recompute=mode)
        assert (len(forward_then), len(backward_then)) == (len(forward), len(backward) + num_more)
    # With constant rows "layer" gathers their keys and values, and later brings rows and angles into order.
    assert [len(ops) for ops in launches(CAPTION_FIRST, True)] == [13, 20]
    assert [len(ops) for ops in launches(CAPTION_FIRST, True, recompute="layer")] == [13 + 2, 20 + 9 + 6]


def test_cached_inference_launches_twelve_kernels():
    block = make_block(qk_norm=True)
    starts = [32 * document for document in range(4)]
    layout = lk.TokenLayout.from_spans(DOCUMENTS, cached_lengths=[2, 0, 1, 3], cache_starts=starts, cache_slots=4 * 32)
    x, rope = make_inputs(layout, torch.float32)
    weights = block.text.weights(torch.float32), block.image.weights(torch.float32)
    cache = tuple(torch.zeros(4 * 32, KV_HEADS, HEAD_DIM) for _ in range(2))
    with torch.no_grad(), Launches() as counter:
        lk.routed_block(x, layout, *weights, rope, kv_cache=cache)
    assert len(counter.by_op) == 12, counter.by_op


def saved_bytes(block, x, layout, rope, recompute):
    """Bytes of the distinct storages autograd keeps, without weights, rope and the layout's vectors."""
    known = {t.untyped_storage().data_ptr() for t in [*block.parameters(), *rope]}
    known |= {vector.untyped_storage().data_ptr() for vector in layout.vectors.values()}
    storages = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = block(x, layout, rope, recompute=recompute)
    del y
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("qk_norm", [False, True], ids=["", "qk_norm"])
@pytest.mark.parametrize("paired", [True, False], ids=["pair", "one tensor"])
@pytest.mark.parametrize("frozen_text", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_saves_what_the_docstring_says(recompute, frozen_text, paired, qk_norm, dtype):
    num_text, num_live, num_image = 90, 6, 40
    documents = [[("text", num_text), ("marker", 1), ("image", num_image), ("text", num_live - 1)]]
    layout = lk.TokenLayout.from_spans(documents, frozen_text=frozen_text)
    block = make_block(dtype, frozen_text=frozen_text, qk_norm=qk_norm)
    x, rope = make_inputs(layout, dtype, paired=paired)
    e, q_width, kv_width = dtype.itemsize, HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM

    def active(ffn):
        if recompute == "layer":
            return WIDTH * e
        gate_up = 2 * ffn if recompute == "none" else 0
        norms = q_width + 2 * kv_width if qk_norm else 0
        return (2 * WIDTH + 2 * q_width + 2 * kv_width + gate_up + norms) * e + 4 * HEADS + 8

    constant = 2 * kv_width * e + (0 if recompute == "layer" else 8)
    num_constant = num_text if frozen_text else 0
    expected = (
        num_constant * constant + (num_text - num_constant + num_live) * active(FFN) + num_image * active(IMAGE_FFN)
    )
    assert saved_bytes(block, x, layout, rope, recompute) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", ["ffn", "layer"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"qkv_bias": True}, {"separation": "shallow"}], ids=str)
@pytest.mark.parametrize("paired", [True, False], ids=["pair", "one tensor"])
def test_recomputed_gradients_are_the_same_to_the_bit(paired, options, recompute, dtype):
    block = make_block(dtype, frozen_text=False, **options)
    layout = lk.TokenLayout.from_spans(DOCUMENTS, frozen_text=False)
    x, rope = make_inputs(layout, dtype, paired=paired)
    expected = run(block, x, layout, rope, "native")
    for name, value in run(block, x, layout, rope, "native", recompute=recompute).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("recompute", ["ffn", "layer"])
@pytest.mark.parametrize("paired", [True, False], ids=["pair", "one tensor"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["", "qk_norm"])
@pytest.mark.parametrize(
    "documents", [DOCUMENTS, CAPTION_FIRST, IMAGE_FIRST, [[("text", 5)]], [[("image", 4)]], []], ids=str
)
def test_recomputed_gradients_with_frozen_text(documents, qk_norm, paired, recompute):
    """The GEMMs have fewer rows than in the forward, so the last bit may differ."""
    block = make_block(qk_norm=qk_norm)
    layout = lk.TokenLayout.from_spans(documents)
    x, rope = make_inputs(layout, torch.float32, paired=paired)
    expected = run(block, x, layout, rope, "native")
    for name, value in run(block, x, layout, rope, "native", recompute=recompute).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def gemm_flops(counter):
    counts = counter.get_flop_counts().get("Global", {})
    return sum(flops for op, flops in counts.items() if str(op).startswith(("aten.mm", "aten.addmm")))


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recomputing_costs_the_flops_of_what_is_computed_again(recompute):
    layout = lk.TokenLayout.from_spans([[("text", 64), ("image", 64), ("text", 32)]])
    block = make_block()
    x, rope = make_inputs(layout, torch.float32)
    with FlopCounterMode(display=False) as forward:
        y = block(x, layout, rope, recompute=recompute)
    with FlopCounterMode(display=False) as backward:
        (y[0].sum() + y[1].sum()).backward()

    def size(layer, names):
        return sum(p.numel() for name, p in layer.named_parameters() if p.dim() == 2 and any(n in name for n in names))

    every, down = ("",), ("down_proj",)
    again = {"none": (), "ffn": ("gate_up_proj",), "layer": ("qkv_proj", "o_proj", "gate_up_proj")}[recompute]
    num_live, num_image = layout.num_live, layout.num_image
    assert gemm_flops(forward) == 2 * (layout.num_text * size(block.text, every) + num_image * size(block.image, every))
    ideal = num_live * (size(block.text, every) + size(block.text, again)) + num_image * (
        2 * size(block.image, every) + size(block.image, again)
    )
    assert gemm_flops(backward) == 2 * ideal
    assert size(block.text, again) <= size(block.text, every) - size(block.text, down)


def test_nothing_is_kept_where_nothing_is_trained():
    block = make_block()
    block.requires_grad_(False)
    layout = lk.TokenLayout.from_spans(DOCUMENTS)
    x, rope = make_inputs(layout, torch.float32)
    for recompute in RECOMPUTE:
        assert saved_bytes(block, x, layout, rope, recompute) == 0
        assert all(y.grad_fn is None for y in block(x, layout, rope, recompute=recompute))
