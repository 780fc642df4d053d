"""The CUDA RoPE with reordering and QK norm is right, forward, backward and into a cache, for any size of head."""

import pytest
import torch

import lmfusion_kernels as lk
from lmfusion_kernels import reference
from tests.kernels.cuda_emulation.device import from_spans, make_layout, shifted, to_device
from tests.kernels.ops import test_rope_reorder as on_cpu
from tests.kernels.ops import test_row_extremes as extremes
from tests.kernels.ops.row_ops import LAYOUTS, assert_as_good_as_reference, random

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEADS, KV_HEADS = on_cpu.HEADS, on_cpu.KV_HEADS
ALL_NORMS = on_cpu.NORMS["all norms"]
ops = torch.ops.lmfusion_emulated


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norms", on_cpu.NORMS.values(), ids=on_cpu.NORMS)
@pytest.mark.parametrize("paired", [False, True], ids=["one tensor", "pair"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("head_dim", [10, 32])
def test_equals_reference(cuda_ops, head_dim, name, paired, norms, dtype):
    layout = make_layout(name)
    tensors = on_cpu.make_tensors(layout, dtype, paired, norms, head_dim)
    assert_as_good_as_reference(on_cpu.make_op(layout, head_dim), tensors)
    launched = [
        name for name in cuda_ops.launched() if name != "reorder_rows_kernel"
    ]  # the reference launches this one
    assert len(launched) <= 3  # forward, backward, sums of the norms' gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 8, 16, 48, 64, 74, 80, 96, 128, 256])
def test_head_sizes(cuda_ops, head_dim, dtype):
    layout = from_spans([[("text", 5), ("image", 4), ("text", 3)], [("text", 2), ("image", 1)]])
    tensors = on_cpu.make_tensors(layout, dtype, False, ALL_NORMS, head_dim)
    assert_as_good_as_reference(on_cpu.make_op(layout, head_dim), tensors)
    assert_as_good_as_reference(on_cpu.make_op(layout, head_dim), {"qkv": tensors["qkv"]})


@pytest.mark.parametrize("frozen", [["text_q_norm", "text_k_norm"], ALL_NORMS, ["qkv"]], ids=str)
def test_frozen_tensors_get_no_gradient(cuda_ops, frozen):
    layout = make_layout("mixed")
    tensors = on_cpu.make_tensors(layout, torch.float32, False, ALL_NORMS, 16)
    assert_as_good_as_reference(on_cpu.make_op(layout, 16), tensors, frozen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (9, 3), (28, 4), (32, 8)])
def test_numbers_of_heads(cuda_ops, heads, kv_heads, dtype):
    """Numbers of heads of SmolLM2, BAGEL and LMFusion-8B, and numbers that no group of heads divides."""
    layout = from_spans([[("text", 2), ("image", 3)]])
    rope = on_cpu.make_rope(layout, 64)
    tensors = {"qkv": random(5, (heads + 2 * kv_heads) * 64, dtype=dtype)}
    tensors |= {name: random(64, dtype=dtype, seed=i) for i, name in enumerate(ALL_NORMS, 1)}

    def op(backend, qkv, **norms):
        return lk.rope_reorder(qkv, layout, rope, heads, **norms, eps=1e-5, backend=backend)

    assert_as_good_as_reference(op, tensors)
    assert_as_good_as_reference(op, {"qkv": tensors["qkv"]})


@pytest.mark.parametrize("paired", [False, True], ids=["one tensor", "pair"])
@pytest.mark.parametrize("head_dim", [10, 16])
@pytest.mark.parametrize("norms", ["no norms", "all norms", "image norms"])
def test_queries_of_constant_rows_apart(cuda_ops, norms, head_dim, paired):
    """As the block calls it: queries of constant rows separate, and a backward over the active rows."""
    layout = make_layout("mixed")
    num_constant, num_live, num_text = layout.num_constant, layout.num_live, layout.num_text
    cos, sin = on_cpu.make_rope(layout, head_dim)
    tensors = on_cpu.make_tensors(layout, torch.float32, paired, on_cpu.NORMS[norms], head_dim)
    weights = [tensors.get(name) for name in ALL_NORMS]
    qkv = [tensors["qkv_text"], tensors["qkv_image"]] if paired else [tensors["qkv"]]
    order = layout.tower_to_sequence
    arguments = (qkv, cos, sin, order, layout.order.query_row, num_text, num_constant, HEADS, *weights, 1e-5)
    ours, on_cpu_too = ops.rope_reorder(*arguments), torch.ops.lmfusion.rope_reorder(*arguments)
    for result, expected in zip(ours, on_cpu_too, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)

    grads = [random(layout.num_active, heads, head_dim, seed=heads) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    live = [torch.cat(qkv)[num_constant:num_text].clone(), torch.cat(qkv)[num_text:].clone()]
    rows = live if norms != "no norms" else []
    for joined in (False, True):
        for wants in ((False, True), (True, True), (False, False)):
            active = layout.active
            arguments = (
                *grads, [torch.cat(rows)] if joined and rows else rows, cos, sin, active.out_row, active.key, num_live,
                HEADS, *weights, 1e-5, *wants, joined,
            )  # fmt: skip
            ours = ops.rope_reorder_backward(*arguments)
            expected = torch.ops.lmfusion.rope_reorder_backward(*arguments)
            assert len(ours) == len(expected)
            for result, other in zip(ours, expected, strict=True):
                torch.testing.assert_close(result, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [10, 64])
def test_norm_gradients_do_not_depend_on_the_order_of_blocks(cuda_ops, head_dim, dtype):
    layout = from_spans([[("text", 30), ("image", 40)]] * 2)
    tensors = on_cpu.make_tensors(layout, dtype, False, ALL_NORMS, head_dim)
    results = []
    for seed in range(3):
        cuda_ops.seed(seed)
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        q, k, v = on_cpu.make_op(layout, head_dim)("native", **leaves)
        torch.autograd.backward([q, k, v], [random(*t.shape, dtype=dtype) for t in (q, k, v)])
        results.append([leaf.grad for leaf in leaves.values()])
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("num_multiprocessors", [1, 3, 132])
@pytest.mark.parametrize("head_dim", [10, 64])
def test_any_number_of_multiprocessors(cuda_ops, head_dim, num_multiprocessors):
    cuda_ops.set_num_multiprocessors(num_multiprocessors)
    layout = from_spans([[("text", 30), ("image", 40)]])
    tensors = on_cpu.make_tensors(layout, torch.bfloat16, False, ALL_NORMS, head_dim)
    assert_as_good_as_reference(on_cpu.make_op(layout, head_dim), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("paired", [False, True], ids=["one tensor", "pair"])
@pytest.mark.parametrize("norms", ["no norms", "all norms"])
@pytest.mark.parametrize("head_dim", [10, 64])
def test_keys_and_values_go_into_the_cache(cuda_ops, head_dim, norms, paired, dtype):
    layout = make_layout("mixed")
    rope = on_cpu.make_rope(layout, head_dim)
    tensors = on_cpu.make_tensors(layout, dtype, paired, on_cpu.NORMS[norms], head_dim)
    weights = [tensors.get(name) for name in ALL_NORMS]
    qkv = [tensors["qkv_text"], tensors["qkv_image"]] if paired else [tensors["qkv"]]
    slot = torch.randperm(100, generator=torch.Generator().manual_seed(1))[: layout.num_tokens].int()
    caches = [random(100, KV_HEADS, head_dim, dtype=dtype, seed=seed) for seed in (1, 2)]
    before = [cache.clone() for cache in caches]
    q = ops.rope_reorder_cached(
        qkv, *rope, layout.tower_to_sequence, slot, layout.num_text, HEADS, *weights, 1e-5, *caches
    )
    order = layout.tower_to_sequence
    expected = ops.rope_reorder(qkv, *rope, order, order, layout.num_text, 0, HEADS, *weights, 1e-5)
    torch.testing.assert_close(q, expected[1])
    for cache, old, new in zip(caches, before, expected[2:], strict=True):
        torch.testing.assert_close(cache, old.index_copy(0, slot.long(), new))


@pytest.mark.parametrize("offset", [1, 4, 8])
def test_rows_that_start_anywhere(cuda_ops, offset):
    layout = make_layout("mixed")
    rope = on_cpu.make_rope(layout, 64)
    width = (HEADS + 2 * KV_HEADS) * 64
    qkv = random(offset + layout.num_tokens * width, dtype=torch.bfloat16)[offset:].view(-1, width)
    expected = reference.rope_reorder(qkv, layout, rope, HEADS)
    order = layout.tower_to_sequence
    result = ops.rope_reorder([qkv], *rope, order, order, layout.num_text, 0, HEADS, *[None] * 4, 1e-5)
    for a, b in zip(result[1:], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)


def run_everything(layout, qkv_text, qkv_image, cos, sin, k_cache, v_cache, dq, dk, dv, **norms):
    """The results of all three ops by op, including the caches."""
    order, num_text = layout.tower_to_sequence, layout.num_text
    qkv, norms = [qkv_text, qkv_image], [norms[name] for name in ALL_NORMS]
    yield ops.rope_reorder(qkv, cos, sin, order, order, num_text, 0, HEADS, *norms, 1e-5)
    q = ops.rope_reorder_cached(qkv, cos, sin, order, order, num_text, HEADS, *norms, 1e-5, k_cache, v_cache)
    yield q, k_cache, v_cache
    for with_norms in (True, False):
        rows, weights = (qkv, norms) if with_norms else ([], [None] * 4)
        yield ops.rope_reorder_backward(
            dq, dk, dv, rows, cos, sin, layout.sequence_to_tower, None, num_text, HEADS, *weights, 1e-5,
            with_norms, with_norms, False,
        )  # fmt: skip


ROPE_TENSORS = ["qkv_text", "qkv_image", "cos", "sin", *ALL_NORMS, "k_cache", "v_cache", "dq", "dk", "dv"]


@pytest.mark.parametrize("name", ROPE_TENSORS)
def test_every_tensor_may_start_anywhere(cuda_ops, name):
    """A single tensor that is not aligned to 16 bytes makes packs of 16 bytes impossible."""
    layout, head_dim = from_spans([[("text", 3), ("image", 4)]]), 16
    tensors = on_cpu.make_tensors(layout, torch.bfloat16, True, ALL_NORMS, head_dim)
    tensors |= dict(zip(("cos", "sin"), on_cpu.make_rope(layout, head_dim), strict=True))
    for i, other in enumerate(("k_cache", "v_cache", "dq", "dk", "dv")):
        heads = HEADS if other == "dq" else KV_HEADS
        tensors[other] = random(layout.num_tokens, heads, head_dim, dtype=torch.bfloat16, seed=20 + i)
    moved = {other: shifted(t) if other == name else t.clone() for other, t in tensors.items()}  # with its own caches
    for results, expected in zip(run_everything(layout, **moved), run_everything(layout, **tensors), strict=True):
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_norms", [False, True], ids=["no norms", "norms"])
@pytest.mark.parametrize("head_dim", [10, 64])
def test_rows_of_every_kind(cuda_ops, head_dim, has_norms, dtype):
    extremes.check_rope(to_device(extremes.rope_layout()), dtype, head_dim, has_norms)
