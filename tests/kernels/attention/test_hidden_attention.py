"""Attention with hidden spans, forward and backward, by every kernel that runs on a CPU, and in a block."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import lmfusion_kernels as lk
from lmfusion_kernels import reference
from lmfusion_kernels.attention import dispatch
from lmfusion_kernels.attention.flex import Flex
from lmfusion_kernels.attention.interface import AttentionCall, AttentionProblem
from lmfusion_kernels.attention.reference import Reference
from lmfusion_kernels.attention.two_pass import TwoPass
from tests.kernels.attention.packed_causal import PlainPackedCausal
from tests.kernels.attention.test_hybrid_attention import DTYPES, HEADS, assert_as_good_as_reference, make_inputs
from tests.kernels.ops.row_ops import needs_native


def batches(lengths):
    pairs = st.tuples(st.sampled_from(["text", "image", "marker"]), lengths)
    shown = st.one_of(pairs, st.tuples(st.just("full"), st.lists(pairs, min_size=1, max_size=2)))
    spans = st.tuples(shown, st.booleans()).map(lambda pair: (*pair[0], "hidden") if pair[1] else pair[0])
    return st.lists(st.lists(spans, min_size=1, max_size=4), min_size=1, max_size=4)


documents = batches(st.one_of(st.integers(1, 9), st.integers(10, 150), st.sampled_from([64, 128])))
short_documents = batches(st.integers(1, 12))

BAGEL = [("text", 30), ("full", [("marker", 1), ("image", 90), ("marker", 1)], "hidden"),
         ("full", [("marker", 1), ("image", 90), ("marker", 1)]), ("full", [("text", 40)]), ("text", 20)]  # fmt: skip
BATCHES = {
    "a noised copy before a clean one": [BAGEL, [("text", 5)], BAGEL],
    "hidden first": [[("image", 70, "hidden"), ("text", 40)], [("text", 9, "hidden"), ("text", 3), ("image", 5)]],
    "hidden last": [[("text", 40), ("image", 70, "hidden")], [("image", 3, "hidden")], [("text", 3)]],
    "all hidden": [[("image", 70, "hidden")], [("text", 9, "hidden"), ("marker", 1, "hidden")]],
    "adjacent": [[("text", 20), *[("image", 40, "hidden")] * 3, ("image", 40), ("text", 9)]],
    "at the borders of tiles": [
        [("text", 64), ("image", 64, "hidden"), ("text", 64), ("image", 128, "hidden"), ("text", 1)]
    ],
    "hidden text before the first image": [
        [("text", 70), ("text", 70, "hidden"), ("text", 9), ("image", 9), ("text", 5)]
    ],
    "one token": [[("image", 1, "hidden")]],
}  # fmt: skip


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_native_equals_reference(name, dtype):
    assert_as_good_as_reference(lk.TokenLayout.from_spans(BATCHES[name]), 6, 2, 24, dtype)


@needs_native
@settings(max_examples=30)
@given(documents, st.sampled_from(HEADS), st.sampled_from([16, 40, 64]), st.sampled_from(DTYPES), st.integers(0, 99))
def test_native_equals_reference_on_random_documents(documents, heads, head_dim, dtype, seed):
    documents = [*documents, [("text", 60)]] if dtype == torch.bfloat16 else documents
    assert_as_good_as_reference(lk.TokenLayout.from_spans(documents), *heads, head_dim, dtype, seed=seed)


def assert_kernel_equals_specification(kernel, layout, dtype, tolerance, seed=0, backward=True):
    """All, active and constant queries: out, lse and gradients."""
    num = {"all": layout.num_tokens, "active": layout.num_active, "constant": layout.num_constant}
    for rows, n in num.items():
        if n == 0:
            continue
        q, k, v, dout = make_inputs(n, layout.num_tokens, 4, 2, 8, dtype, seed)
        out, lse = kernel.forward(AttentionCall(q, k, v, layout, rows, 0.3))
        expected, expected_lse = Reference().forward(AttentionCall(q, k, v, layout, rows, 0.3))
        assert (out - expected).abs().max() <= tolerance and (lse - expected_lse).abs().max() <= tolerance, rows
        if rows == "constant" or not backward:
            continue
        grads = kernel.backward(AttentionCall(q, k, v, layout, rows, 0.3), dout, out, lse)
        targets = Reference().backward(AttentionCall(q, k, v, layout, rows, 0.3), dout, expected, expected_lse)
        for name, grad, target in zip(("dq", "dk", "dv"), grads, targets, strict=True):
            assert grad.shape == target.shape and (grad - target).abs().max() <= tolerance, (rows, name)


@pytest.mark.parametrize("frozen_text", [True, False])
@pytest.mark.parametrize("name", BATCHES)
def test_two_pass_equals_the_specification(name, frozen_text):
    layout = lk.TokenLayout.from_spans(BATCHES[name], frozen_text=frozen_text)
    assert_kernel_equals_specification(TwoPass(PlainPackedCausal()), layout, torch.float64, 1e-12)


@settings(max_examples=20)
@given(short_documents, st.booleans(), st.integers(0, 99))
def test_two_pass_on_random_documents(documents, frozen_text, seed):
    layout = lk.TokenLayout.from_spans(documents, frozen_text=frozen_text)
    assert_kernel_equals_specification(TwoPass(PlainPackedCausal()), layout, torch.float64, 1e-12, seed)


@needs_native
@settings(max_examples=15)
@given(documents, st.integers(0, 99))
def test_native_on_active_and_constant_rows(documents, seed):
    layout = lk.TokenLayout.from_spans(documents)
    assert_kernel_equals_specification(dispatch.KERNELS["native"], layout, torch.float32, 2e-4, seed)


@pytest.mark.parametrize("name", BATCHES)
def test_flex_equals_the_specification(name):
    layout = lk.TokenLayout.from_spans(BATCHES[name])
    assert_kernel_equals_specification(Flex(), layout, torch.float64, 1e-12, backward=False)


def test_flash_attention_4_says_that_it_cannot():
    """So it is passed over, even if it would be the fastest."""
    cuda = torch.device("cuda")
    case = AttentionProblem(cuda, torch.bfloat16, 8, 2, 64, needs_grad=False, is_cached=False, has_hidden=True)
    assert dispatch.KERNELS["flash-attn-4"].unsupported_reason(case) == "it takes no hidden spans"
    assert dispatch.KERNELS["flash-attn-4"].unsupported_reason(case._replace(has_hidden=False)) == ""


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_nothing_outside_depends_on_what_is_hidden(backend):
    """Other values in a hidden image change only its own tokens, which still see everything before them."""
    layout = lk.TokenLayout.from_spans([[("text", 70), ("image", 50, "hidden"), ("image", 50), ("text", 30)]])
    q, k, v, _ = make_inputs(200, 200, 4, 2, 16)
    out = lk.hybrid_attention(q, k, v, layout, backend=backend)
    hidden, before = torch.zeros(200, dtype=torch.bool), torch.zeros(200, dtype=torch.bool)
    hidden[70:120], before[:70] = True, True
    for changed, expected in ((hidden, hidden), (before, ~before)):
        k2, v2 = (torch.where(changed[:, None, None], x + 1, x) for x in (k, v))
        differs = (lk.hybrid_attention(q, k2, v2, layout, backend=backend) != out).flatten(1).any(1)
        assert differs[~before].equal(expected[~before])


@needs_native
def test_the_visible_rows_are_those_of_a_batch_without_the_hidden_ones():
    """Except for rounding: with 64 hidden tokens at a tile's border the same tiles of keys remain."""
    with_hidden = lk.TokenLayout.from_spans([[("text", 64), ("image", 64, "hidden"), ("image", 50), ("text", 30)]])
    without = lk.TokenLayout.from_spans([[("text", 64), ("image", 50), ("text", 30)]])
    q, k, v, _ = make_inputs(208, 208, 4, 2, 16)
    kept = [i for i in range(208) if not 64 <= i < 128]
    out = lk.hybrid_attention(q, k, v, with_hidden)[kept]
    torch.testing.assert_close(out, lk.hybrid_attention(q[kept], k[kept], v[kept], without), rtol=1e-6, atol=1e-6)


@needs_native
def test_flops_are_those_of_the_visible_pairs():
    layout = lk.TokenLayout.from_spans([[("text", 10), ("image", 20, "hidden"), ("image", 20), ("text", 5)]])
    pairs = int(reference.hybrid_mask(layout).sum())
    q, k, v, dout = make_inputs(55, 55, 4, 2, 16)
    for x in (q, k, v):
        x.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = lk.hybrid_attention(q, k, v, layout)
    assert counter.get_total_flops() == 4 * 4 * 16 * pairs
    with FlopCounterMode(display=False) as counter:
        out.backward(dout)
    assert counter.get_total_flops() == 10 * 4 * 16 * pairs


@needs_native
def test_operator_registrations():
    layout = lk.TokenLayout.from_spans([[("text", 3), ("image", 4, "hidden"), ("text", 2)]])
    q, k, v, _ = make_inputs(9, 9, 2, 1, 16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    vectors = layout.key_start, layout.key_end, None, 0.25, layout.mask.visible_end, layout.hidden.run_end
    torch.library.opcheck(torch.ops.lmfusion.hybrid_attention, (*leaves, *vectors))
    with pytest.raises(RuntimeError, match="visible_end must be a contiguous int32 vector with 9 entries"):
        torch.ops.lmfusion.hybrid_attention(
            q, k, v, layout.key_start, layout.key_end, None, 0.25, layout.mask.visible_end[1:]
        )


@needs_native
@pytest.mark.parametrize("frozen_text", [True, False])
@pytest.mark.parametrize("recompute", ["none", "ffn", "layer"])
def test_block_equals_reference(frozen_text, recompute):
    """Forward and every gradient of a block in float32 against the reference in float64, shared positions given."""
    layout = lk.TokenLayout.from_spans([BAGEL, [("text", 7, "hidden"), ("text", 9), BAGEL[1]]], frozen_text=frozen_text)
    torch.manual_seed(0)
    block = lk.RoutedBlock(hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, frozen_text=frozen_text)
    positions = torch.arange(layout.num_tokens) // 5
    rope = lk.rope_tables(positions, 100.0 ** -torch.linspace(0, 1, block.head_dim // 2))
    x, dy = torch.randn(2, layout.num_tokens, 32).unbind()

    def step(dtype, op):
        parameters = dict(block.named_parameters())
        leaves = [x.to(dtype).requires_grad_()]
        towers = [tower.weights(dtype) for tower in (block.text, block.image)]
        y = op(leaves[0], layout, *towers, tuple(table.to(dtype) for table in rope))
        wanted = [parameter for parameter in parameters.values() if parameter.requires_grad]
        return [y, *torch.autograd.grad(y, leaves + wanted, dy.to(dtype))]

    exact = step(torch.float64, reference.routed_block)
    result = step(torch.float32, lambda *a: lk.routed_block(*a[:4], rope, recompute=recompute))
    plain = run_in(torch.float32, step)
    for target, same_dtype, value in zip(exact, plain, result, strict=True):
        error, allowed = ((other.double() - target).square().mean().sqrt() for other in (value, same_dtype))
        assert error <= 2 * allowed + 1e-6


def run_in(dtype, step):
    return step(dtype, reference.routed_block)


def test_a_block_with_a_cache_refuses_hidden_spans():
    with pytest.raises(ValueError, match=r"hidden span.*key-value cache"):
        lk.TokenLayout.from_spans([[("image", 2, "hidden")]], cached_lengths=[0], cache_starts=[0], cache_slots=4)
