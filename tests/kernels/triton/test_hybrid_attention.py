"""The Triton attention kernels are right, forward and backward, for every mask, in Triton's interpreter on the CPU."""

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import lmfusion_kernels as lk
from lmfusion_kernels.ops.hybrid_attention import ranges_by_key
from lmfusion_kernels.triton.hybrid_attention_configurations import Configurations, Tile, configurations
from tests.kernels.triton import interpreter

pytest.importorskip("triton", reason="triton is not installed")

MODULE = "lmfusion_kernels.triton.hybrid_attention"
DTYPES = [torch.float32, torch.float16]
MIXED = [[("text", 70), ("image", 90), ("text", 30)], [("image", 5), ("text", 1)], [("text", 3), ("marker", 1)]]


def tiles(block: int, step: int, border: int, descriptors: bool) -> Configurations:
    """The interpreter ignores warps and stages; it is fast with few large tiles."""
    tile = Tile(block, step, border, 4, 2, descriptors)
    split = Tile(64, step, step, 4, 2, descriptors)
    return Configurations(tile, split, tile, tile)


LARGE, SMALL, BY_POINTER = tiles(128, 64, 32, True), tiles(32, 32, 16, True), tiles(32, 64, 32, False)

UNSHRUNK = [Phase.explicit, Phase.reuse, Phase.generate]  # an example takes a second, and shrinking needs too many

spans = st.tuples(st.sampled_from(["text", "image", "marker"]), st.one_of(st.integers(1, 9), st.integers(10, 60)))
documents = st.lists(st.lists(spans, min_size=1, max_size=3), min_size=1, max_size=3)


def make_inputs(num_queries, num_keys, num_heads, num_kv_heads, head_dim, dtype=torch.float32, seed=0):
    """q, k, v and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(num_queries, num_heads), (num_keys, num_kv_heads), (num_keys, num_kv_heads), (num_queries, num_heads)]
    return [torch.randn(*size, head_dim, generator=generator).to(dtype) for size in sizes]


def int32(values):
    return torch.as_tensor(values, dtype=torch.int32)


def forward(*arguments, **options):
    return interpreter.call(MODULE, "forward", *arguments, **options)


def triton_attention(q, k, v, dout, key_start, key_end, scale, grad_key=None, by_key=None, out_row=None, tiles=LARGE):
    """out, lse, dq, dk, dv of the kernels; out by query."""
    if grad_key is None:
        grad_key = torch.arange(k.shape[0], dtype=torch.int32)
        by_key = ranges_by_key(key_start, key_end, k.shape[0])
    rows = slice(None) if out_row is None else out_row.long()
    stored_dout = torch.empty_like(dout)
    stored_dout[rows] = dout
    return interpreter.call(
        "tests.kernels.triton.test_hybrid_attention", "forward_and_backward", stored_dout, q, k, v, key_start, key_end,
        grad_key, *by_key, out_row, scale, tiles,
    )  # fmt: skip


def forward_and_backward(dout, q, k, v, key_start, key_end, grad_key, query_start, query_end, out_row, scale, tiles):
    """In the interpreter."""
    from lmfusion_kernels.triton import hybrid_attention

    out, lse = hybrid_attention.forward(q, k, v, key_start, key_end, out_row, scale, tiles=tiles)
    grads = hybrid_attention.backward(
        dout, q, k, v, out, lse, key_start, key_end, grad_key, query_start, query_end, out_row, scale, tiles=tiles
    )
    return (out if out_row is None else out[out_row.long()]), lse, *grads


def dense_attention(q, k, v, dout, key_start, key_end, scale, dtype=torch.float64):
    """The same results from the full score matrix and PyTorch's autograd, in `dtype`. A query without keys gives 0."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    wide_q, wide_k, wide_v = (x.to(torch.promote_types(dtype, torch.float32)) for x in leaves)
    wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (wide_k, wide_v))
    key = torch.arange(k.shape[0])
    mask = (key >= key_start[:, None]) & (key < key_end[:, None])
    scores = (torch.einsum("nhd,mhd->hnm", wide_q, wide_k) * scale).masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.where(mask, (scores - lse[..., None].nan_to_num(neginf=0.0)).exp(), 0.0)
    out = torch.einsum("hnm,mhd->nhd", weights, wide_v).to(dtype)
    grads = torch.autograd.grad(out, leaves, dout.to(dtype))
    return [x.detach().double() for x in (out, lse, *grads)]


def assert_as_good_as_dense(q, k, v, dout, key_start, key_end, scale, grad_key=None, **options):
    """Errors against float64, as root mean squares: at most twice those of the dense form in the same dtype.

    The floor is what rounding, also that of `out` to the dtype, leaves of gradients of scores that cancel.
    """
    exact = dense_attention(q, k, v, dout, key_start, key_end, scale)
    plain = dense_attention(q, k, v, dout, key_start, key_end, scale, q.dtype)
    result = triton_attention(q, k, v, dout, key_start, key_end, scale, grad_key, **options)
    if grad_key is not None:
        for some in (exact, plain):
            some[3:] = [grad[grad_key.long()] for grad in some[3:]]
    unit = max(1.0, exact[0].square().mean().sqrt().item()) if exact[0].numel() else 1.0
    floor = 4 * torch.finfo(torch.float32).eps + torch.finfo(q.dtype).eps / 4 * unit
    for name, target, same_dtype, value in zip(("out", "lse", "dq", "dk", "dv"), exact, plain, result, strict=True):
        assert value.shape == target.shape and value.dtype == (torch.float32 if name == "lse" else q.dtype)
        is_finite = target.isfinite()
        assert value.isfinite().equal(is_finite) and value[~is_finite].eq(float("-inf")).all(), name
        if is_finite.any():
            error = (value.double() - target)[is_finite].square().mean().sqrt()
            allowed = 2 * (same_dtype - target)[is_finite].square().mean().sqrt() + floor
            assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "num_heads", "num_kv_heads"),
    [(64, 2, 1), (96, 1, 1), (128, 2, 2), (256, 1, 1), (8, 3, 1), (24, 1, 1), (80, 1, 1)],
)
def test_equals_reference(head_dim, num_heads, num_kv_heads, dtype):
    layout = lk.TokenLayout.from_spans(MIXED)
    inputs = make_inputs(layout.num_tokens, layout.num_tokens, num_heads, num_kv_heads, head_dim, dtype)
    assert_as_good_as_dense(*inputs, layout.key_start, layout.key_end, head_dim**-0.5)


@pytest.mark.parametrize("tiles", [LARGE, SMALL, BY_POINTER], ids=["large", "small", "pointers"])
def test_every_kind_of_tile(tiles):
    """Interior tiles (an image and a text that are longer than any tile), borders, tiles of several documents."""
    layout = lk.TokenLayout.from_spans([[("text", 3)], [("image", 140), ("text", 20)], *[[("text", 2)]] * 5])
    inputs = make_inputs(layout.num_tokens, layout.num_tokens, 1, 1, 32, torch.float16)
    assert_as_good_as_dense(*inputs, layout.key_start, layout.key_end, 0.2, tiles=tiles)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "capability"), [(torch.float16, (8, 0)), (torch.float16, (9, 0)), (torch.float32, (9, 0))], ids=str
)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tiles_of_the_table(head_dim, dtype, capability):
    layout = lk.TokenLayout.from_spans([[("text", 20), ("image", 140), ("text", 100)], [("image", 40)]])
    table = configurations(head_dim, dtype.itemsize, capability)
    inputs = make_inputs(layout.num_tokens, layout.num_tokens, 2, 1, head_dim, dtype)
    assert_as_good_as_dense(*inputs, layout.key_start, layout.key_end, head_dim**-0.5, tiles=table)
    few = make_inputs(20, layout.num_tokens, 2, 1, head_dim, dtype)
    ranges = layout.key_start[-50:-30].clone(), layout.key_end[-50:-30].clone()
    assert_as_good_as_dense(*few, *ranges, head_dim**-0.5, tiles=table)


@settings(max_examples=15, phases=UNSHRUNK)
@given(
    documents,
    st.booleans(),
    st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    st.sampled_from([16, 40, 64]),
    st.sampled_from(DTYPES),
    st.sampled_from([LARGE, SMALL, BY_POINTER]),
    st.integers(0, 99),
)
def test_random_documents(documents, only_active, heads, head_dim, dtype, tiles, seed):
    """All rows, or only the active ones, stored in tower order as in a block with frozen text."""
    layout = lk.TokenLayout.from_spans(documents)
    num_queries = layout.num_active if only_active else layout.num_tokens
    q, k, v, dout = make_inputs(num_queries, layout.num_tokens, *heads, head_dim, dtype, seed)
    ranges, options = (layout.key_start, layout.key_end), {}
    if only_active:
        ranges = layout.active.key_start, layout.active.key_end
        by_key = layout.active.query_start, layout.active.query_end
        options = {"grad_key": layout.active.key, "by_key": by_key, "out_row": layout.active.out_row}
    assert_as_good_as_dense(q, k, v, dout, *ranges, head_dim**-0.5, tiles=tiles, **options)


@settings(max_examples=12, phases=UNSHRUNK)
@given(
    st.sampled_from([1, 7, 40, 129, 150]),
    st.integers(1, 200),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.sampled_from(DTYPES),
    st.sampled_from([SMALL, BY_POINTER]),
    st.integers(0, 999),
)
def test_random_ranges(num_queries, num_keys, heads, dtype, tiles, seed):
    """Any monotone ranges: gaps, empty ones, overlaps; any of the keys listed. Up to 128 queries use the kernels for
    few queries, more use the others."""
    random = np.random.default_rng(seed)
    key_start, key_end = (np.sort(random.integers(0, num_keys + 1, num_queries)) for _ in range(2))
    ranges = int32(key_start), int32(np.maximum(key_start, key_end))
    grad_key = int32(np.flatnonzero(random.random(num_keys) < random.random()))
    by_key = tuple(x[grad_key.long()].contiguous() for x in ranges_by_key(*ranges, num_keys))
    inputs = make_inputs(num_queries, num_keys, *heads, 16, dtype, seed)
    row = int32(random.permutation(num_queries))
    assert_as_good_as_dense(*inputs, *ranges, 0.3, grad_key, by_key=by_key, out_row=row, tiles=tiles)


@pytest.mark.parametrize(
    ("starts", "num_rows"),
    [([0, 400, 800, 1200], 1600), ([11, 360, 480, 700], 770)],
    ids=["stretches", "gaps"],
)
@pytest.mark.parametrize(
    ("num_new", "heads", "dtype", "tiles"),
    [
        (1, (1, 1), torch.float32, SMALL),
        (1, (6, 2), torch.float16, BY_POINTER),
        (3, (8, 1), torch.float16, SMALL),
        (3, (2, 2), torch.float32, BY_POINTER),
        (40, (1, 1), torch.float16, LARGE),
        (40, (2, 1), torch.float32, BY_POINTER),
    ],
)
def test_generation_with_a_cache(num_new, heads, dtype, tiles, starts, num_rows):
    """Documents of different lengths, each continued by a few tokens. Cache slots that no query sees hold NaN, and the
    results are those of each document alone. 40 new tokens per document are too many for the kernels for few queries.
    """
    cached, head_dim = [300, 7, 90, 0], 16
    document = [("text", 1)] if num_new == 1 else [("text", 1), ("image", num_new - 1)]
    cache = {"cached_lengths": cached, "cache_starts": starts, "cache_slots": num_rows}
    layout = lk.TokenLayout.from_spans([document] * 4, **cache)
    q, k, v, _ = make_inputs(layout.num_tokens, layout.num_keys, *heads, head_dim, dtype)
    is_seen = torch.zeros(layout.num_keys, dtype=torch.bool)
    for start, length in zip(starts, cached, strict=True):
        is_seen[start : start + length + num_new] = True
    exact, exact_lse, *_ = dense_attention(q, k, v, q, layout.key_start, layout.key_end, 0.25)
    plain, *_ = dense_attention(q, k, v, q, layout.key_start, layout.key_end, 0.25, dtype)
    k, v = (torch.where(is_seen[:, None, None], x, float("nan")) for x in (k, v))
    out, lse = forward(q, k, v, layout.key_start, layout.key_end, None, 0.25, tiles=tiles)
    assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max() + torch.finfo(dtype).eps
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_new", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_documents_that_pad_a_batch_share_their_keys(num_new, dtype):
    """Nine of them behind two documents, which are what they are without: few queries, and more than few."""
    documents, starts = [[("image", num_new)]] * 2, [3, 40]
    real = lk.TokenLayout.from_spans(documents, cached_lengths=[9, 30], cache_starts=starts, cache_slots=120)
    padded = lk.TokenLayout.from_spans(
        [[("image", num_new)]] * 11, cached_lengths=[9, 30] + [0] * 9, cache_starts=starts + [100] * 9, cache_slots=120
    )
    q, k, v, _ = make_inputs(padded.num_tokens, 120, 2, 1, 16, dtype)
    k[:3] = v[:3] = k[90:100] = v[90:100] = float("nan")
    expected, expected_lse = forward(q[: real.num_tokens], k, v, real.key_start, real.key_end, None, 0.25, tiles=SMALL)
    out, lse = forward(q, k, v, padded.key_start, padded.key_end, None, 0.25, tiles=SMALL)
    assert out.isfinite().all() and lse.isfinite().all()
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out[: real.num_tokens], expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse[:, : real.num_tokens], expected_lse, rtol=1e-5, atol=1e-5)


def test_few_queries_are_stored_at_out_row():
    q, k, v, _ = make_inputs(5, 70, 3, 1, 24)
    ranges, row = (int32([0, 0, 5, 60, 60]), int32([3, 40, 41, 60, 70])), int32([4, 2, 0, 1, 3])
    expected, expected_lse = forward(q, k, v, *ranges, None, 1.0, tiles=SMALL)
    out, lse = forward(q, k, v, *ranges, row, 1.0, tiles=SMALL)
    assert out[row.long()].equal(expected) and lse.equal(expected_lse)
    assert out[1].eq(0).all() and lse[:, 3].eq(float("-inf")).all()  # the query without keys


def test_few_queries_of_documents_side_by_side():
    """The tile of the last keys of a document reaches into the next one, whose queries see those keys once."""
    inputs = make_inputs(4, 150, 2, 1, 16)
    assert_as_good_as_dense(*inputs, int32([0, 0, 38, 38]), int32([36, 37, 149, 150]), 0.25, tiles=SMALL)


@pytest.mark.parametrize("tiles", [LARGE, BY_POINTER], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("num_queries", [21, 140])
def test_queries_that_see_nothing_have_no_gradient(num_queries, tiles):
    """The first and the last of every seven: at both ends, and in tiles with queries that do see keys."""
    query = torch.arange(num_queries)
    document, place = query // 7 * 7, query % 7
    ranges = int32(document + 7 * (place == 6)), int32(document + 7 * (place > 0))
    inputs = make_inputs(num_queries, num_queries, 2, 1, 16)
    result = triton_attention(*inputs, *ranges, 0.25, tiles=tiles)
    is_blind = (place == 0) | (place == 6)
    assert result[1][:, is_blind].eq(float("-inf")).all() and result[2][is_blind].eq(0).all()
    for x, y in zip(result, dense_attention(*inputs, *ranges, 0.25), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)


def test_query_whose_scores_are_all_minus_infinity_has_no_gradient():
    """Like a query without keys: its log-sum-exp is -inf, although it has keys, because their scores are out of
    range."""
    q, k, v, dout = make_inputs(3, 6, 1, 1, 16)
    q[1], k[2:4] = 1e20, -1e20
    ranges = int32([0, 2, 4]), int32([2, 4, 6])
    out, lse, dq, dk, dv = triton_attention(q, k, v, dout, *ranges, 0.25)
    assert lse.isneginf().tolist() == [[False, True, False]]
    for x in (out[1], dq[1], dk[2:4], dv[2:4]):
        assert x.eq(0).all()
    assert all(x.isfinite().all() and x[0].ne(0).any() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 3.0])
def test_scale(scale):
    for num_queries in (140, 20):
        inputs = make_inputs(num_queries, 140, 1, 1, 16)
        assert_as_good_as_dense(*inputs, int32([0] * num_queries), int32(range(1, num_queries + 1)), scale)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 0), (0, 5), (4, 0), (1, 1)])
def test_empty_and_one(num_queries, num_keys):
    ranges = int32([0] * num_queries), int32([num_keys] * num_queries)
    inputs = make_inputs(num_queries, num_keys, 4, 2, 16)
    out, lse, dq, dk, dv = triton_attention(*inputs, *ranges, 1.0)
    assert out.shape == dq.shape == (num_queries, 4, 16) and dk.shape == dv.shape == (num_keys, 2, 16)
    if num_keys == 0:
        assert out.eq(0).all() and dq.eq(0).all() and lse.eq(float("-inf")).all()
    elif num_queries == 0:
        assert dk.eq(0).all() and dv.eq(0).all()
    else:
        torch.testing.assert_close(out, inputs[2].repeat_interleave(2, dim=1))


@pytest.mark.parametrize("tiles", [LARGE, BY_POINTER], ids=["descriptors", "pointers"])
def test_strided_inputs(tiles):
    """Views of one qkv buffer, as a fused projection gives them; rows that no descriptor can describe; one gradient
    for all, as `out.sum()` gives it."""
    layout = lk.TokenLayout.from_spans([[("text", 5), ("image", 20)], [("text", 7)]])
    n, ranges = layout.num_tokens, (layout.key_start, layout.key_end)
    views = [
        torch.randn(n, 4, 16, dtype=torch.float16).split([2, 1, 1], dim=1),
        [torch.randn(n, heads, 17, dtype=torch.float16)[..., 1:] for heads in (2, 1, 1)],
        [torch.randn(heads, n, 16, dtype=torch.float16).transpose(0, 1) for heads in (2, 1, 1)],
    ]
    for q, k, v in views:
        dout = torch.ones(1, 1, 1, dtype=torch.float16).expand(n, 2, 16)
        expected = triton_attention(*(x.contiguous() for x in (q, k, v, dout)), *ranges, 1.0, tiles=tiles)
        active = layout.active.key.long()
        result = interpreter.call(
            "tests.kernels.triton.test_hybrid_attention", "forward_and_backward", dout, q, k, v, *ranges,
            layout.active.key, layout.mask.query_start[active], layout.mask.query_end[active], None, 1.0, tiles,
        )  # fmt: skip
        for name, x, y in zip(("out", "lse", "dq"), result, expected, strict=False):
            assert x.equal(y), name
        for x, y in zip(result[3:], expected[3:], strict=True):
            torch.testing.assert_close(x, y[active], rtol=1e-2, atol=1e-3)


def far_rows(stride: int) -> list[torch.Tensor]:
    """In the interpreter: attention of rows that lie `stride` elements apart, and the same rows side by side."""
    from lmfusion_kernels.triton import hybrid_attention

    torch.utils.deterministic.fill_uninitialized_memory = False  # untouched gigabytes take no memory
    near = make_inputs(160, 160, 1, 1, 16, torch.float16)
    far = [torch.empty(160 * stride, dtype=torch.float16).as_strided(x.shape, (stride, 16, 1)) for x in near]
    torch.utils.deterministic.fill_uninitialized_memory = True
    for x, y in zip(far, near, strict=True):
        x.copy_(y)
    ranges, listed = (int32([0] * 160), int32([160] * 160)), torch.arange(160, dtype=torch.int32)
    results = []
    for q, k, v, dout in (near, far):
        for some in (BY_POINTER, LARGE):
            out, lse = hybrid_attention.forward(q, k, v, *ranges, None, 0.25, tiles=some)
            arguments = (dout, q, k, v, out, lse, *ranges, listed, *ranges, None, 0.25)
            results.append([out, *hybrid_attention.backward(*arguments, tiles=some)])
    return results


def test_addresses_beyond_32_bits():
    near, near_large, far, far_large = interpreter.call("tests.kernels.triton.test_hybrid_attention", "far_rows", 2**24)
    assert all(x.equal(y) for x, y in zip((*near, *near_large), (*far, *far_large), strict=True))


def test_same_bits_again():
    layout = lk.TokenLayout.from_spans(MIXED)
    inputs = make_inputs(layout.num_tokens, layout.num_tokens, 2, 1, 16)
    first, second = (triton_attention(*inputs, layout.key_start, layout.key_end, 0.25) for _ in range(2))
    assert all(x.equal(y) for x, y in zip(first, second, strict=True))


def test_number_of_parts():
    """Enough programs for the device but not more, and the same for the same shapes."""

    def splits(*shape):
        return interpreter.call(MODULE, "num_splits_of", *shape)

    assert splits(8, 131072, 64, 132) == 33  # one query, 8 key-value heads: 264 programs
    assert splits(8, 300, 64, 132) == 2  # at least four tiles per part
    assert splits(512, 131072, 64, 132) == 1
    assert splits(1, 131072, 64, 132) == 64

    def head_parts(*shape):
        return interpreter.call(MODULE, "num_head_parts", *shape)

    assert head_parts(512, 4, 132) == 1
    assert head_parts(128, 4, 132) == 2
    assert head_parts(8, 6, 132) == 6
    assert head_parts(100, 6, 132) == 2


def test_bfloat16_and_consumer_devices_have_tiles():
    for capability, largest in (((8, 0), 99), ((8, 6), 99), ((9, 0), 227), ((12, 0), 99)):
        for head_dim, size in ((8, 2), (64, 2), (80, 2), (128, 4), (256, 2)):
            table = configurations(head_dim, size, capability)
            assert table.forward.step % table.forward.border == 0 and table.queries.step % table.queries.border == 0
            tile = table.keys
            padded = max(16, 1 << (head_dim - 1).bit_length())
            rows = 2 * tile.block + 2 * tile.step * (tile.num_stages if tile.descriptors else 1)
            assert rows * padded * size <= largest * 1024


BAD_INPUTS = {
    "flat q": (lambda q, k, v: (q.flatten(1), k, v), r"q must be \[Nq, H, D\]"),
    "k unlike v": (lambda q, k, v: (q, k, v[:, :1]), "k and v both"),
    "heads": (lambda q, k, v: (q[:, :3], k, v), "q must have a multiple of the 2 heads of k and v, got 3"),
    "dtype": (lambda q, k, v: (q, k.half(), v), "one dtype"),
    "double": (lambda *x: [y.double() for y in x], "float16, bfloat16 or float32"),
    "head size": (lambda *x: [y[..., :12] for y in x], "head size must be a multiple of 8 up to 256 .*, got 12"),
    "large head": (lambda *x: [y.repeat(1, 1, 17) for y in x], "head size .* got 272"),
    "no head size": (lambda *x: [y[..., :0] for y in x], "head size .* got 0"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(name):
    spoil, message = BAD_INPUTS[name]
    q, k, v, _ = make_inputs(9, 9, 4, 2, 16)
    ranges = int32([0] * 9), int32([9] * 9)
    with pytest.raises(ValueError, match=message):
        forward(*spoil(q, k, v), *ranges, None, 1.0)


def test_bad_vectors_and_gradients():
    q, k, v, dout = make_inputs(9, 9, 4, 2, 16)
    start, end = int32([0] * 9), int32([9] * 9)
    with pytest.raises(ValueError, match="key_end must be a contiguous int32 vector with 9 entries"):
        forward(q, k, v, start, end.long(), None, 1.0)
    with pytest.raises(ValueError, match="out_row must be"):
        forward(q, k, v, start, end, start[1:], 1.0)
    out, lse = forward(q, k, v, start, end, None, 1.0)
    good = {"dout": dout, "out": out, "lse": lse, "query_start": start}
    for name, bad in {"dout": dout[1:], "out": out.half(), "lse": lse[:2], "query_start": start[1:]}.items():
        x = good | {name: bad}
        with pytest.raises(ValueError, match=name):
            interpreter.call(
                MODULE, "backward", x["dout"], q, k, v, x["out"], x["lse"], start, end, start, x["query_start"], end,
                None, 1.0,
            )  # fmt: skip
