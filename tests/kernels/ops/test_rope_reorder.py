"""RoPE and QK norm, and every row at its place in sequence order, forward and backward."""

import pytest
import torch

import lmfusion_kernels as lk
from lmfusion_kernels import reference
from lmfusion_kernels.ops.rope_reorder import rope_reorder
from tests.kernels.ops.row_ops import (
    LAYOUTS,
    assert_as_good_as_reference,
    assert_compiles,
    make_layout,
    needs_native,
    random,
)

DTYPES = [torch.float32, torch.bfloat16]
HEADS, KV_HEADS = 4, 2
NORMS = {
    "no norms": [],
    "all norms": ["text_q_norm", "text_k_norm", "image_q_norm", "image_k_norm"],
    "image norms": ["image_q_norm", "image_k_norm"],
    "q norms": ["text_q_norm", "image_q_norm"],
}


def make_rope(layout, head_dim):
    return lk.rope_tables(layout.position, 1e4 ** -torch.linspace(0, 1, head_dim // 2), attention_scaling=1.1)


def make_tensors(layout, dtype, paired, norms, head_dim=10):
    width = (HEADS + 2 * KV_HEADS) * head_dim
    sizes = dict.fromkeys(norms, (head_dim,))
    if paired:
        sizes |= {"qkv_text": (layout.num_text, width), "qkv_image": (layout.num_image, width)}
    else:
        sizes["qkv"] = (layout.num_tokens, width)
    return {name: random(*size, seed=i, dtype=dtype, scale=2.0) for i, (name, size) in enumerate(sizes.items())}


def make_op(layout, head_dim=10):
    rope = make_rope(layout, head_dim)

    def op(backend, qkv=None, qkv_text=None, qkv_image=None, **norms):
        rows = (qkv_text, qkv_image) if qkv is None else qkv
        return rope_reorder(rows, layout, rope, HEADS, **norms, eps=1e-5, backend=backend)

    return op


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norms", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("paired", [False, True], ids=["one tensor", "pair"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_reference(name, paired, norms, dtype):
    layout = make_layout(name)
    assert_as_good_as_reference(make_op(layout), make_tensors(layout, dtype, paired, norms))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 64, 74, 128])
def test_head_sizes(head_dim, dtype):
    layout = make_layout("mixed")
    tensors = make_tensors(layout, dtype, False, NORMS["all norms"], head_dim)
    assert_as_good_as_reference(make_op(layout, head_dim), tensors)
    assert_as_good_as_reference(make_op(layout, head_dim), {"qkv": tensors["qkv"]})


@needs_native
@pytest.mark.parametrize("frozen", [["text_q_norm", "text_k_norm"], NORMS["all norms"], ["qkv"]], ids=str)
def test_frozen_tensors_get_no_gradient(frozen):
    layout = make_layout("mixed")
    assert_as_good_as_reference(make_op(layout), make_tensors(layout, torch.float32, False, NORMS["all norms"]), frozen)


@needs_native
def test_keeps_rows_only_for_norms():
    layout = make_layout("mixed")
    for norms in ([], NORMS["all norms"]):
        tensors = make_tensors(layout, torch.float32, False, norms)
        tensors["qkv"].requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            make_op(layout)("native", **tensors)
        assert any(t is tensors["qkv"] for t in saved) == bool(norms)


@needs_native
def test_queries_of_constant_rows_apart():
    """As the block uses it: queries of constant tokens in a separate tensor, and a backward over the others only."""
    layout = make_layout("mixed")
    num_constant, num_live = layout.num_constant, layout.num_live
    assert num_constant > 0 and num_live > 0
    cos, sin = make_rope(layout, 10)
    tensors = make_tensors(layout, torch.float32, False, NORMS["all norms"])
    norms = [tensors[name] for name in NORMS["all norms"]]
    qkv = tensors["qkv"].requires_grad_()
    order = layout.tower_to_sequence
    arguments = (num_constant, HEADS, *norms, 1e-5)
    op = torch.ops.lmfusion.rope_reorder
    q_constant, q_active, k, v = op([qkv], cos, sin, order, layout.order.query_row, layout.num_text, *arguments)

    exact_q, exact_k, exact_v = reference.rope_reorder(qkv, layout, (cos, sin), HEADS, *norms, 1e-5)
    torch.testing.assert_close(q_constant, exact_q[order[:num_constant]])
    torch.testing.assert_close(q_active, exact_q[layout.active.key])
    torch.testing.assert_close(k, exact_k)
    torch.testing.assert_close(v, exact_v)

    grads = [random(*t.shape, seed=i) for i, t in enumerate((q_constant, q_active, k, v))]
    (dqkv,) = torch.autograd.grad((q_constant, q_active, k, v), qkv, grads)
    dq = torch.zeros_like(exact_q)
    dq[order[:num_constant]], dq[layout.active.key] = grads[0], grads[1]
    (expected,) = torch.autograd.grad((exact_q, exact_k, exact_v), qkv, (dq, *grads[2:]), retain_graph=True)
    torch.testing.assert_close(dqkv, expected)

    active = layout.active.key
    rows = list(qkv.detach()[num_constant:].tensor_split([num_live]))
    dlive, dimage, *dnorms = torch.ops.lmfusion.rope_reorder_backward(
        grads[1], grads[2][active], grads[3][active], rows, cos, sin, layout.active.out_row, active, num_live, HEADS,
        *norms, 1e-5, False, True,
    )  # fmt: skip
    torch.testing.assert_close(torch.cat([dlive, dimage]), expected[num_constant:])
    assert [tuple(d.shape) for d in dnorms] == [(10,), (10,)]  # the image tower's alone


def make_cached(dtype, norms, paired=True, head_dim=10, num_slots=90):
    """Arguments of rope_reorder_cached for the mixed layout, with keys that go to shuffled slots of filled caches."""
    layout = make_layout("mixed")
    tensors = make_tensors(layout, dtype, paired, NORMS[norms], head_dim)
    qkv = [tensors["qkv_text"], tensors["qkv_image"]] if paired else [tensors["qkv"]]
    weights = [tensors.get(name) for name in NORMS["all norms"]]
    slot = torch.randperm(num_slots, generator=torch.Generator().manual_seed(1))[: layout.num_tokens].int()
    caches = [random(num_slots, KV_HEADS, head_dim, dtype=dtype, seed=seed) for seed in (20, 21)]
    order = layout.tower_to_sequence
    return (qkv, *make_rope(layout, head_dim), order, slot, layout.num_text, HEADS, *weights, 1e-5, *caches)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("paired", [False, True], ids=["one tensor", "pair"])
def test_cached_equals_rope_reorder_and_index_copy(paired, norms, dtype):
    arguments = make_cached(dtype, norms, paired)
    qkv, cos, sin, order, slot, num_text, num_heads, *weights, eps, k_cache, v_cache = arguments
    _, q, *new = torch.ops.lmfusion.rope_reorder(qkv, cos, sin, order, order, num_text, 0, num_heads, *weights, eps)
    expected = [cache.index_copy(0, slot.long(), rows) for cache, rows in zip((k_cache, v_cache), new, strict=True)]
    assert torch.equal(torch.ops.lmfusion.rope_reorder_cached(*arguments), q)
    assert torch.equal(k_cache, expected[0])
    assert torch.equal(v_cache, expected[1])


@needs_native
@pytest.mark.parametrize("norms", ["no norms", "all norms"])
def test_cached_schema_and_fake(norms):
    torch.library.opcheck(torch.ops.lmfusion.rope_reorder_cached.default, make_cached(torch.float32, norms))


@needs_native
def test_cached_compiles_to_one_graph():
    eager, compiled = (make_cached(torch.float32, "all norms") for _ in range(2))
    expected = torch.ops.lmfusion.rope_reorder_cached(*eager)
    op = torch.compile(lambda *a: torch.ops.lmfusion.rope_reorder_cached(*a), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(op(*compiled), expected)
    torch.testing.assert_close(compiled[-2:], eager[-2:])


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({4: torch.full((64,), 90, dtype=torch.int32)}, r"key_slot must hold indices in \[0, 90\), got"),
        ({12: random(90, KV_HEADS, 8)}, r"k_cache must have shape \[90, 2, 10\], got \[90, 2, 8\]"),
        ({13: random(80, KV_HEADS, 10)}, r"v_cache must have shape \[90, 2, 10\], got \[80, 2, 10\]"),
        ({12: random(90, KV_HEADS * 10)}, r"k_cache must have shape \[0, 2, 10\], got \[90, 20\]"),
        ({13: random(90, KV_HEADS, 10).bfloat16()}, "v_cache must have dtype Float, got BFloat16"),
        ({12: random(90, KV_HEADS, 20)[..., ::2]}, "k_cache must be contiguous, because it is written in place"),
    ],
)
def test_cached_op_checks_its_arguments(change, message):
    arguments = make_cached(torch.float32, "no norms")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lmfusion.rope_reorder_cached(*(change.get(i, value) for i, value in enumerate(arguments)))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_gradients_do_not_depend_on_threads(dtype):
    layout = lk.TokenLayout.from_spans([[("text", 700), ("image", 800)]] * 2)
    tensors = make_tensors(layout, dtype, False, NORMS["all norms"])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
            q, k, v = make_op(layout)("native", **leaves)
            torch.autograd.backward([q, k, v], [random(*t.shape, dtype=dtype) for t in (q, k, v)])
            results.append([leaf.grad for leaf in leaves.values()])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@needs_native
def test_rows_that_are_not_contiguous():
    layout = make_layout("mixed")
    qkv = random(80, layout.num_tokens).t()
    results = (make_op(layout)(backend, qkv=qkv) for backend in ("native", "reference"))
    for native, expected in zip(*results, strict=True):
        torch.testing.assert_close(native, expected)


@needs_native
@pytest.mark.parametrize("paired", [False, True], ids=["one tensor", "pair"])
@pytest.mark.parametrize("norms", [NORMS["no norms"], NORMS["all norms"]], ids=["no norms", "all norms"])
def test_schema_fake_and_autograd(norms, paired):
    layout = make_layout("mixed")
    cos, sin = make_rope(layout, 10)
    (*weights,) = (random(10, seed=i).requires_grad_() for i in range(4)) if norms else [None] * 4
    width = (HEADS + 2 * KV_HEADS) * 10
    sizes = [layout.num_text, layout.num_image] if paired else [layout.num_tokens]
    qkv = [random(size, width, seed=5).requires_grad_() for size in sizes]
    order, constant = layout.tower_to_sequence, layout.num_constant
    ops = torch.ops.lmfusion
    common = (HEADS, *weights, 1e-5)
    for row, count in ((order, 0), (layout.order.query_row, constant)):
        torch.library.opcheck(ops.rope_reorder.default, (qkv, cos, sin, order, row, layout.num_text, count, *common))
    weights = [None if weight is None else weight.detach() for weight in weights]
    grads = [random(layout.num_tokens, heads, 10, seed=heads) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    rows = [t.detach() for t in qkv] if norms else []
    for key in (None, layout.position):
        torch.library.opcheck(
            ops.rope_reorder_backward.default,
            (*grads, rows, cos, sin, layout.sequence_to_tower, key, layout.num_text, HEADS, *weights, 1e-5, True, False,
             not paired),
        )  # fmt: skip


@needs_native
@pytest.mark.parametrize("paired", [False, True], ids=["one tensor", "pair"])
@pytest.mark.parametrize("norms", [NORMS["no norms"], NORMS["all norms"]], ids=["no norms", "all norms"])
def test_compiles_to_one_graph(norms, paired):
    layout = make_layout("mixed")
    assert_compiles(make_op(layout), make_tensors(layout, torch.float32, paired, norms))


def test_reference_gradients():
    layout = lk.TokenLayout.from_spans([[("text", 2), ("image", 3), ("text", 1)]])
    tensors = make_tensors(layout, torch.float64, True, NORMS["all norms"], head_dim=4)
    names = list(tensors)

    def op(*values):
        return make_op(layout, head_dim=4)("reference", **dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(op, [tensor.requires_grad_() for tensor in tensors.values()], fast_mode=True)


def test_without_native_ops(monkeypatch):
    monkeypatch.setenv("LMFUSION_KERNELS_BACKEND", "reference")
    layout = make_layout("mixed")
    qkv = random(layout.num_tokens, 80)
    _, _, v = make_op(layout)(None, qkv=qkv)
    torch.testing.assert_close(v.flatten(1)[layout.tower_to_sequence], qkv[:, 60:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": random(64, 79)}, r"qkv must be \(H \+ 2 H_kv\) D wide with H = 4 query heads and D = 10, .* got 79"),
        ({"qkv": (random(51, 80), random(13, 100))}, "towers, got 100"),
        ({"num_heads": 8}, "towers, got 80"),
        ({"num_heads": 0}, "towers, got 80"),
        ({"rope": (random(63, 5), random(63, 5))}, r"got shapes \(63, 5\) and \(63, 5\)"),
        ({"rope": (random(64, 5), random(64, 4))}, r"N = 64 tokens"),
        ({"rope": (random(64, 5, dtype=torch.bfloat16), random(64, 5))}, "cos must be float32, got torch.bfloat16"),
        ({"rope": (random(64, 5), random(64, 5).to("meta"))}, "sin must be on the rows' device cpu, got meta"),
        ({"text_q_norm": random(8)}, r"text_q_norm must be \[10\] for .*, got shape \(8,\)"),
        (
            {"image_k_norm": random(10, dtype=torch.bfloat16)},
            "image_k_norm must be in the rows' dtype torch.float32, got torch.bfloat16",
        ),
    ],
)
def test_wrong_arguments(change, message):
    right = {"qkv": random(64, 80), "rope": (random(64, 5), random(64, 5)), "num_heads": HEADS}
    with pytest.raises(ValueError, match=message):
        rope_reorder(**right | change, layout=make_layout("mixed"))


@needs_native
@pytest.mark.parametrize("bad", [-1, 4])
def test_native_op_checks_its_indices(bad):
    order = torch.tensor([0, 1, 2, bad], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"tower_to_sequence must hold indices in \[0, 4\), got"):
        torch.ops.lmfusion.rope_reorder(
            [random(4, 80)], random(4, 5), random(4, 5), order, order, 2, 0, HEADS, None, None, None, None, 1e-5
        )
