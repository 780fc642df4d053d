"""The block on the GPU equals the reference, for every kind of row, cache and recomputation, without a wait."""

import pytest
import torch

import lmfusion_kernels as lk
from lmfusion_kernels.attention import dispatch
from lmfusion_kernels.ops import gate_up_swiglu as ffn
from tests.kernels.gpu.support import (
    DEVICE,
    DOCUMENTS,
    DTYPES,
    ON_GPU,
    assert_close_as_plain,
    assert_same_bits,
    block_inputs,
    make_block,
    make_layout,
    needs_gpu,
    no_host_sync,
    peak_memory,
    rope_of,
    run_block,
    skip_unless_it_runs,
)


def assert_as_good_as_plain(block, rows, layout, rope, **options):
    plain = run_block(block, rows, layout, rope, backend="reference")
    dtype = rows[0].dtype
    wide = tuple(t.double() for t in rows)
    exact = run_block(block.double(), wide, layout, rope, loss_dtype=dtype, backend="reference")
    ours = run_block(block.to(dtype), rows, layout, rope, **options)
    for name, target in exact.items():
        if target is None:
            assert ours[name] is None, name
        elif name == "x_text":  # constant rows: exactly zero
            assert ours[name][: layout.num_constant].eq(0).all()
            assert_close_as_plain(ours[name], plain[name], target, name)
        else:
            assert_close_as_plain(ours[name], plain[name], target, name)


@pytest.mark.parametrize("frozen_text", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_rows_of_every_kind(name, dtype, frozen_text):
    layout = make_layout(name, frozen_text)
    assert_as_good_as_plain(make_block(dtype, frozen_text=frozen_text), *_inputs(layout, dtype))


@pytest.mark.parametrize(
    "options",
    [{"qk_norm": True}, {"qkv_bias": True}, {"image_hidden_size": 80}, {"separation": "shallow"},
     {"separation": "none"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_variants_of_the_block(dtype, options):
    layout = make_layout("mixed")
    block = make_block(dtype, **options)
    assert_as_good_as_plain(block, *_inputs(layout, dtype, options.get("image_hidden_size", 128)))


@pytest.mark.parametrize("kernel", [name for name in dispatch.KERNELS if name != "reference"])
def test_attention_kernels_in_the_block(kernel):
    """Active and constant rows: queries that only the backward uses, and keys without gradients."""
    layout = make_layout("mixed")
    skip_unless_it_runs(kernel, layout, torch.bfloat16, 4, 2, 64)
    assert_as_good_as_plain(make_block(torch.bfloat16), *_inputs(layout, torch.bfloat16), backend=kernel)


@pytest.mark.parametrize("frozen_text", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("recompute", ["ffn", "layer"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["", "qk norm"])
def test_recomputing(recompute, frozen_text, qk_norm):
    block = make_block(torch.bfloat16, frozen_text=frozen_text, qk_norm=qk_norm)
    assert_as_good_as_plain(block, *_inputs(make_layout("mixed", frozen_text), torch.bfloat16), recompute=recompute)


@pytest.mark.parametrize("frozen_text", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("recompute", ["none", "ffn"])
@pytest.mark.parametrize("kernel", [name for name in ffn.FFN_KERNELS if name != "two-calls"])
def test_feed_forward_kernels(kernel, recompute, frozen_text, monkeypatch):
    monkeypatch.setenv("LMFUSION_KERNELS_FFN", kernel)
    block = make_block(torch.bfloat16, frozen_text=frozen_text)
    rows, layout, rope = _inputs(make_layout("mixed", frozen_text), torch.bfloat16)
    try:
        ffn.choose_ffn(
            rows, [tower.mlp.gate_up_proj.weight for tower in (block.text, block.image)], recompute == "none"
        )
    except ValueError as reason:
        pytest.skip(str(reason))
    assert_as_good_as_plain(block, rows, layout, rope, recompute=recompute)


def test_sequence_order():
    layout = make_layout("mixed")
    block, (rows, layout, rope) = make_block(torch.bfloat16), _inputs(layout, torch.bfloat16)
    x = torch.cat(rows)
    with torch.no_grad():
        expected = layout.to_sequence_order(block(x, layout, rope))
        assert torch.equal(block(layout.to_sequence_order(x), layout, rope, order="sequence"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reading_through_a_cache_equals_one_pass(dtype):
    """A prompt, an image, then tokens one by one; rows of two documents of different length."""
    block = make_block(dtype)
    pieces = [[[("text", 9)], [("text", 4)]], [[("image", 16)], [("image", 16)]], *[[[("text", 1)]] * 2] * 3]
    documents = [[span for piece in pieces for span in piece[d]] for d in range(2)]
    layout = lk.TokenLayout.from_spans(documents, frozen_text=False, device=DEVICE)
    rows, rope = block_inputs(layout, dtype)
    weights = block.text.weights(dtype), block.image.weights(dtype)
    cache_place, lengths = {"cache_starts": [3, 47], "cache_slots": 100}, [0, 0]
    with torch.no_grad():
        x = layout.to_sequence_order(torch.cat(rows))
        whole = layout.to_sequence_order(torch.cat(block(rows, layout, rope)))
        exact = layout.to_sequence_order(torch.cat(_exact(block, rows, layout, rope)))
        cache = tuple(torch.zeros(100, 2, 64, dtype=dtype, device=DEVICE) for _ in range(2))
        for piece in pieces:
            part = lk.TokenLayout.from_spans(piece, cached_lengths=lengths, **cache_place, device=DEVICE)
            starts = [lengths[0], sum(n for _, n in documents[0]) + lengths[1]]
            counts = [sum(n for _, n in piece[d]) for d in range(2)]
            chosen = torch.cat([torch.arange(s, s + n, device=DEVICE) for s, n in zip(starts, counts, strict=True)])
            y = lk.routed_block(
                part.to_tower_order(x[chosen]), part, *weights, rope_of(part, 64), kv_cache=cache
            )  # fmt: skip
            assert_close_as_plain(part.to_sequence_order(y), whole[chosen], exact[chosen], f"from {lengths}")
            lengths = [length + count for length, count in zip(lengths, counts, strict=True)]


def _exact(block, rows, layout, rope):
    dtype = rows[0].dtype
    result = block.double()(tuple(t.double() for t in rows), layout, rope, backend="reference")
    block.to(dtype)
    return result


@pytest.mark.parametrize("frozen_text", [True, False], ids=["frozen", "trained"])
def test_same_bits_every_time(frozen_text):
    layout = make_layout("mixed", frozen_text)
    block = make_block(torch.bfloat16, frozen_text=frozen_text, qk_norm=True, qkv_bias=True)
    rows, layout, rope = _inputs(layout, torch.bfloat16)
    first = run_block(block, rows, layout, rope)
    for _ in range(49):
        assert_same_bits(run_block(block, rows, layout, rope), first)


@pytest.mark.parametrize("recompute", ["none", "ffn", "layer"])
@pytest.mark.parametrize("frozen_text", [True, False], ids=["frozen", "trained"])
def test_nothing_waits_for_the_device(frozen_text, recompute):
    block = make_block(torch.bfloat16, frozen_text=frozen_text, qk_norm=True)
    rows, layout, rope = _inputs(make_layout("mixed", frozen_text), torch.bfloat16)
    weights = [torch.ones_like(rows[0][layout.num_constant :]), torch.ones_like(rows[1])]
    trained = [p for p in block.parameters() if p.requires_grad]
    for wait in (False, True):  # the first call compiles and loads kernels, which may wait
        with no_host_sync() if wait else torch.enable_grad():
            x = [t.detach().requires_grad_() for t in rows]
            y_text, y_image = block((x[0], x[1]), layout, rope, recompute=recompute)
            torch.autograd.grad([y_text[layout.num_constant :], y_image], [*x, *trained], weights)


def test_nothing_waits_while_decoding():
    block = make_block(torch.bfloat16)
    weights = block.text.weights(torch.bfloat16), block.image.weights(torch.bfloat16)
    cache = tuple(torch.zeros(2 * 64, 2, 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    place = {"cached_lengths": [5, 9], "cache_starts": [0, 64], "cache_slots": 128}
    layout = lk.TokenLayout.from_spans([[("text", 1)]] * 2, **place, device=DEVICE)
    (x, none), rope = block_inputs(layout, torch.bfloat16)
    for wait in (False, True):
        with torch.no_grad(), no_host_sync() if wait else torch.no_grad():
            lk.routed_block((x, none), layout, *weights, rope, kv_cache=cache)


@needs_gpu
def test_a_long_batch_needs_memory_in_proportion_to_its_tokens():
    block = make_block(torch.bfloat16)

    def peak(num_tokens: int) -> int:
        layout = lk.TokenLayout.from_spans([[("text", num_tokens // 2), ("image", num_tokens // 2)]], device=DEVICE)
        rows, rope = block_inputs(layout, torch.bfloat16)
        with peak_memory() as rise:
            run_block(block, rows, layout, rope)
            return rise()

    peak(1024)  # workspaces of the libraries are allocated once
    assert peak(131_072) <= 9 * peak(16_384)


def test_constant_rows_cost_nothing_in_the_backward():
    """Constant rows save only keys and values: less memory than with a trained text tower."""
    if not ON_GPU:
        pytest.skip("memory is counted on a GPU only")
    documents = [[("text", 8192), ("image", 256)]]
    risen = {}
    for frozen_text in (True, False):
        layout = lk.TokenLayout.from_spans(documents, frozen_text=frozen_text, device=DEVICE)
        block = make_block(torch.bfloat16, frozen_text=frozen_text)
        rows, rope = block_inputs(layout, torch.bfloat16)
        before = torch.cuda.memory_allocated()
        y = block((rows[0].requires_grad_(), rows[1].requires_grad_()), layout, rope)
        risen[frozen_text] = torch.cuda.memory_allocated() - before
        del y
    assert risen[True] < 0.5 * risen[False], risen


def _inputs(layout, dtype, width=128):
    rows, rope = block_inputs(layout, dtype, width)
    return rows, layout, rope
