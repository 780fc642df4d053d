"""TokenLayout against its definition, token by token; the compiled builder against the numpy one; bad input; speed."""

import itertools
import time
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmfusion_kernels import TokenLayout, reference
from lmfusion_kernels.layout import build
from lmfusion_kernels.layout.buffer import copy_together, pack, unpack
from lmfusion_kernels.layout.masks import PIECES

MODALITIES = ("text", "image", "marker")
needs_native = pytest.mark.skipif(build._layout_native is None, reason="_layout_native was not compiled")

spans = st.tuples(st.sampled_from(MODALITIES), st.integers(1, 5))
batches = st.lists(st.lists(spans, min_size=1, max_size=6), max_size=4)


def tokens_of(documents):
    """(modality, document, span, position in the document) of every token, in sequence order."""
    tokens, span_number = [], 0
    for d, document in enumerate(documents):
        position = 0
        for modality, length in document:
            for _ in range(length):
                tokens.append((modality, d, span_number, position))
                position += 1
            span_number += 1
    return tokens


def visible(tokens):
    """Bool [N, N] by the definition: query i sees key j."""
    mask = np.zeros((len(tokens), len(tokens)), bool)
    for i, (modality, document, span, _) in enumerate(tokens):
        for j, (_, other_document, other_span, _) in enumerate(tokens):
            in_same_image = modality == "image" and span == other_span
            mask[i, j] = document == other_document and (j <= i or in_same_image)
    return mask


def constant_tokens(tokens, frozen_text):
    """Bool [N]: text before the first image or marker of its document, if the text tower is frozen."""
    trained_documents, result = set(), []
    for modality, document, _, _ in tokens:
        if modality != "text":
            trained_documents.add(document)
        result.append(frozen_text and document not in trained_documents)
    return np.array(result, bool)


def ranges_to_mask(starts, ends, num_columns):
    column = np.arange(num_columns)
    return (column >= starts.numpy()[:, None]) & (column < ends.numpy()[:, None])


def assert_equal_layouts(a, b):
    assert a.counts == b.counts
    for (name, x), (other_name, y) in zip(a.vectors.items(), b.vectors.items(), strict=True):
        assert name == other_name and torch.equal(x, y), name


@given(batches, st.booleans())
def test_orders_and_counts(documents, frozen_text):
    layout = TokenLayout.from_spans(documents, frozen_text=frozen_text)
    tokens = tokens_of(documents)
    is_constant = constant_tokens(tokens, frozen_text)
    is_image = np.array([modality == "image" for modality, *_ in tokens], bool)
    index = np.arange(len(tokens))
    expected = np.concatenate([index[is_constant], index[~is_constant & ~is_image], index[is_image]])
    assert layout.tower_to_sequence.tolist() == expected.tolist()
    assert layout.sequence_to_tower[layout.tower_to_sequence].tolist() == index.tolist()
    assert layout.position.tolist() == [position for *_, position in tokens]
    assert layout.num_tokens == layout.num_keys == len(tokens)
    assert layout.num_documents == len(documents)
    assert (layout.num_constant, layout.num_image) == (is_constant.sum(), is_image.sum())
    assert layout.num_constant + layout.num_live + layout.num_image == layout.num_tokens
    assert not layout.is_cached or layout.num_tokens == 0
    assert all(vector.dtype == torch.int32 for vector in layout.vectors.values())


@given(batches, st.booleans())
def test_mask_by_query_and_by_key(documents, frozen_text):
    layout = TokenLayout.from_spans(documents, frozen_text=frozen_text)
    mask = visible(tokens_of(documents))
    assert (reference.hybrid_mask(layout).numpy() == mask).all()
    assert (ranges_to_mask(layout.mask.query_start, layout.mask.query_end, layout.num_tokens) == mask.T).all()
    for name in ("key_start", "key_end", "query_start", "query_end"):
        assert (getattr(layout.mask, name).diff() >= 0).all(), name
    assert layout.mask.key.tolist() == list(range(layout.num_tokens))


@given(batches, st.booleans())
def test_active_and_constant_tokens(documents, frozen_text):
    """The vectors of the active and of the constant tokens are the mask, restricted to them."""
    layout = TokenLayout.from_spans(documents, frozen_text=frozen_text)
    tokens = tokens_of(documents)
    mask, is_constant = visible(tokens), constant_tokens(tokens, frozen_text)
    active = np.flatnonzero(~is_constant)
    assert layout.active.key.tolist() == active.tolist()
    by_rank = ranges_to_mask(layout.active.key_start, layout.active.key_end, len(tokens))
    assert (by_rank == mask[active]).all()
    by_key = ranges_to_mask(layout.active.query_start, layout.active.query_end, len(active))
    assert (by_key == mask[np.ix_(active, active)].T).all()
    constant = ranges_to_mask(layout.constant.key_start, layout.constant.key_end, len(tokens))
    assert (constant == mask[is_constant]).all()
    assert layout.active.out_row.tolist() == [layout.sequence_to_tower[i] - layout.num_constant for i in active]
    rank = {int(i): r for r, i in enumerate(active)}
    for row, i in enumerate(layout.tower_to_sequence.tolist()):
        assert layout.order.query_row[row] == (row if is_constant[i] else layout.num_constant + rank[i])


@given(batches, st.booleans())
def test_causal_documents_and_triangles_are_the_mask(documents, frozen_text):
    """Causality inside documents, and the triangle that it leaves out in each image: reversed, causal again."""
    layout = TokenLayout.from_spans(documents, frozen_text=frozen_text)
    n = layout.num_tokens
    counted = np.zeros((n, n), int)
    for start, end in itertools.pairwise(layout.causal.start.tolist()):
        counted[start:end, start:end] += np.tri(end - start, dtype=int)
    rows = layout.causal.triangle_query.tolist()
    for start, end in itertools.pairwise(layout.causal.triangle_start.tolist()):
        queries, keys = rows[start:end], [row + 1 for row in rows[start:end]]
        counted[np.ix_(queries, keys)] += np.tri(end - start, dtype=int)
    assert (counted == visible(tokens_of(documents))).all()  # every pair once
    lengths = [sum(length for _, length in document) for document in documents]
    assert layout.causal.start.diff().tolist() == layout.causal.num_keys.tolist() == lengths
    assert layout.causal.key_start.equal(layout.causal.start)
    triangles = layout.causal.triangle_start.diff()
    assert (triangles > 0).all() and layout.counts.longest_triangle == max(triangles.tolist(), default=0)


@given(batches, st.booleans())
def test_documents_and_triangles_of_the_active_rows(documents, frozen_text):
    layout = TokenLayout.from_spans(documents, frozen_text=frozen_text)
    active = layout.active.key.tolist()
    starts = layout.causal.start.tolist()
    expected = [sum(i < start for i in active) for start in starts]
    assert layout.causal.active_start.tolist() == expected
    assert layout.counts.longest_active == max(np.diff(expected), default=0)
    assert [active[rank] for rank in layout.causal.active_triangle_query] == layout.causal.triangle_query.tolist()


@given(batches.filter(bool), st.data())
def test_cached_layout_continues_a_document(documents, data):
    """A document cut between two spans: the second part sees the cache slots of the first as it saw its tokens."""
    cuts = [data.draw(st.integers(0, len(document) - 1)) for document in documents]
    cached_lengths = [sum(n for _, n in document[:cut]) for document, cut in zip(documents, cuts, strict=True)]
    rest = [document[cut:] for document, cut in zip(documents, cuts, strict=True)]
    totals = [sum(n for _, n in document) for document in documents]
    gaps = [data.draw(st.integers(0, 4)) for _ in range(len(documents) + 1)]
    starts = [sum(totals[:d]) + sum(gaps[: d + 1]) for d in range(len(documents))]
    num_rows = sum(totals) + sum(gaps)
    layout = TokenLayout.from_spans(rest, cached_lengths=cached_lengths, cache_starts=starts, cache_slots=num_rows)
    assert layout.is_cached
    assert (layout.num_keys, layout.num_constant) == (num_rows, 0)
    for name in ("key_start", "key_end"):
        assert (getattr(layout, name).diff() >= 0).all(), name

    tokens, whole = tokens_of(documents), visible(tokens_of(documents))
    slots = [starts[document] + position for _, document, _, position in tokens]
    continued = [i for i, (_, document, _, position) in enumerate(tokens) if position >= cached_lengths[document]]
    expected = np.zeros((len(continued), layout.num_keys), bool)
    expected[:, slots] = whole[continued]
    assert (reference.hybrid_mask(layout).numpy() == expected).all()
    assert layout.mask.key.tolist() == [slots[i] for i in continued]
    assert layout.causal.key_start.tolist() == [*starts, num_rows]
    assert layout.causal.num_keys.tolist() == totals and layout.longest_document == max(totals)
    assert layout.counts.longest_active == max(layout.causal.start.diff().tolist())
    assert layout.position.tolist() == [tokens[i][3] for i in continued]


@needs_native
@given(batches, st.booleans(), st.booleans(), st.data())
def test_compiled_builder_equals_numpy(documents, frozen_text, is_cached, data):
    kinds = np.array([MODALITIES.index(modality) for document in documents for modality, _ in document], np.uint8)
    lengths = np.array([length for document in documents for _, length in document], np.int32)
    numbers = np.array([d for d, document in enumerate(documents) for _ in document], np.int32)
    cached = np.array([data.draw(st.integers(0, 9)) for _ in documents], np.int32) if is_cached else None
    starts = np.cumsum([data.draw(st.integers(0, 50)) for _ in documents]).astype(np.int32) if is_cached else None
    arguments = (kinds, lengths, numbers, frozen_text, cached, starts, 1000)
    vectors, counts = build._layout_native.build_layout(*arguments)
    expected_vectors, expected_counts = build.build_layout_numpy(*arguments)
    assert counts == expected_counts
    assert vectors.keys() == expected_vectors.keys()
    for name, vector in vectors.items():
        assert vector.dtype == np.int32, name
        np.testing.assert_array_equal(vector, expected_vectors[name], err_msg=name)


@given(batches, st.booleans())
def test_modality_ids_give_the_layout_of_the_spans(documents, frozen_text):
    tokens = tokens_of(documents)
    modality = torch.tensor([("text", "image", "marker").index(modality) for modality, *_ in tokens], dtype=torch.int64)
    document = np.array([3 * document for _, document, _, _ in tokens], np.int32)  # ids need not be consecutive
    image = [span for _, _, span, _ in tokens]
    layout = TokenLayout.from_modality_ids(modality, document, image, frozen_text=frozen_text)
    assert_equal_layouts(layout, TokenLayout.from_spans(documents, frozen_text=frozen_text))


def test_vectors_are_copied_together_and_aligned():
    vectors = {name: torch.arange(size, dtype=torch.int32) for name, size in (("a", 17), ("none", 0), ("b", 5))}
    copies = copy_together(vectors, "cpu")
    assert list(copies) == list(vectors)
    for name, vector in vectors.items():
        assert torch.equal(copies[name], vector)
        assert (copies[name].data_ptr() - copies["a"].data_ptr()) % 64 == 0
    copies["a"][0] = 9
    assert vectors["a"][0] == 0


def test_a_layout_of_other_vectors():
    """Its vectors are those of its pieces; in a buffer of their own they make the same layout."""
    layout = TokenLayout.from_spans([[("text", 2), ("image", 3)]], frozen_text=False)
    assert {"counts", *PIECES} == {field.name for field in fields(TokenLayout)}
    for name, (_, vectors) in PIECES.items():
        present = {field for field, value in vars(getattr(layout, name)).items() if value is not None}
        assert present == set(vectors)
    assert_equal_layouts(layout.with_vectors(unpack(pack(layout.vectors), layout.vectors)), layout)
    for longest, bound in ((1, 1), (2, 2), (5, 8), (8, 8), (9, 16)):
        assert TokenLayout.from_spans([[("text", longest)]]).bounded().longest_document == bound
    assert_equal_layouts(layout.bounded(most=5), layout)


def test_orders_are_inverse_and_check_rows():
    layout = TokenLayout.from_spans([[("text", 2), ("image", 3), ("text", 1)]])
    x = torch.randn(6, 4)
    assert torch.equal(layout.to_sequence_order(layout.to_tower_order(x)), x)
    with pytest.raises(ValueError, match=r"must have 6 rows .*shape \(5, 4\)"):
        layout.to_tower_order(x[:5])
    with pytest.raises(ValueError, match="must be on the layout's device cpu, got meta"):
        layout.to_tower_order(x.to("meta"))


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[("text", 1)], [("audio", 3)]], r"document 1: .*one of text, image, marker, got 'audio'"),
        ([[("text", 0)]], r"length of a span must be positive, got \('text', 0\)"),
        ([[("image", -4)]], r"length of a span must be positive, got \('image', -4\)"),
        ([[("image", 2.5)]], "must be an integer, got 2.5"),
        ([[("text", 1)], []], "document 1 must have at least one span"),
        ([[("text", 2**64)]], "must fit into 64 bits"),
        (
            [("text", 3)],
            r"document 0: a span must be .*, got 'text'; a batch is a list of documents",
        ),
        ([("ab", 3)], "got 'ab'; a batch is"),
        ("text", "got 't'; a batch is"),
        ([[("text", 3)], [("image", 4, 5)]], r"got \('image', 4, 5\); a batch is"),
        ([[("text", 3), None]], "got None; a batch is"),
        ([[(["text"], 3)]], r"got \['text'\]"),
        ([[("text", None)]], "must be an integer, got None"),
        ([3], "'int' object is not iterable; a batch is a list of documents"),
        (None, "'NoneType' object is not iterable; a batch is a list of documents"),
        ([[("text", 2**30), ("text", 2**30)]], "at most 2147483647 tokens, got 2147483648"),
    ],
)
def test_bad_spans(documents, message):
    with pytest.raises(ValueError, match=message):
        TokenLayout.from_spans(documents)


@pytest.mark.parametrize(
    ("cached_lengths", "cache_starts", "cache_slots", "message"),
    [
        ([1], None, None, "cached_lengths, cache_starts and cache_slots together, or none"),
        (None, [0], 9, "cached_lengths, cache_starts and cache_slots together, or none"),
        ([1], [0], 9, "cached_lengths must have one entry for each of 2 documents, got 1"),
        ([1, 1], [0], 9, "cache_starts must have one entry for each of 2 documents, got 1"),
        ([0, 8], [0, 4], 9, "document 1 would hold 10 tokens, but it has 5 slots of the cache, from 4 to 9; give it"),
        ([3, 0], [0, 4], 9, "document 0 would hold 5 tokens, but it has 4 slots of the cache, from 0 to 4; give it"),
        ([0, 0], [0, 12], 9, "document 1 would hold 2 tokens, but it has 0 slots of the cache, from 12 to 9"),
        ([0, -1], [0, 4], 9, "cached_lengths must be at least 0, got -1 for document 1"),
        ([1, 1], [4, 0], 9, "cache_starts must ascend from 0, got 0 for document 1; sort the documents"),
        ([1, 1], [-1, 4], 9, "cache_starts must ascend from 0, got -1 for document 0"),
        ([0, 0], [4, 4], 9, "documents 0 and 1 both begin at slot 4 of the cache; only documents of one token or one"),
        ([1, 1], [0, 4], 2**31, "cache_slots must be from 0 to 2147483647, got 2147483648"),
        ([1, 1], [0, 4], -1, "cache_slots must be from 0 to 2147483647, got -1"),
    ],
)
def test_bad_cache(cached_lengths, cache_starts, cache_slots, message):
    place = {"cached_lengths": cached_lengths, "cache_starts": cache_starts, "cache_slots": cache_slots}
    with pytest.raises(ValueError, match=message):
        TokenLayout.from_spans([[("text", 2)]] * 2, **place)


@pytest.mark.parametrize(
    ("padding", "cached"), [([("text", 1)], 0), ([("marker", 1)], 3), ([("image", 4)], 0), ([("image", 4)], 3)]
)
def test_documents_that_pad_a_batch_share_their_slots(padding, cached):
    """They are interchangeable, and the documents before them see what they see without padding."""
    documents, lengths, starts = [[("text", 2)], [("image", 3)]], [5, 0], [1, 20]
    layout = TokenLayout.from_spans(
        documents + [padding] * 3, cached_lengths=lengths + [cached] * 3, cache_starts=starts + [40] * 3, cache_slots=50
    )
    alone = TokenLayout.from_spans(documents, cached_lengths=lengths, cache_starts=starts, cache_slots=50)
    num_padding = padding[0][1]
    assert (reference.hybrid_mask(layout)[:5] == reference.hybrid_mask(alone)).all()
    mask = reference.hybrid_mask(layout)[5:].reshape(3, num_padding, 50)
    assert (mask[0] == mask[1]).all() and (mask[0] == mask[2]).all()
    assert mask.nonzero()[:, -1].unique().tolist() == list(range(40, 40 + cached + num_padding))
    assert layout.mask.key[5:].tolist() == [*range(40 + cached, 40 + cached + num_padding)] * 3
    for name in ("key_start", "key_end"):
        assert (getattr(layout, name).diff() >= 0).all(), name


@pytest.mark.parametrize(
    ("documents", "lengths"),
    [
        ([[("text", 1)], [("text", 1)]], [0, 1]),
        ([[("image", 3)], [("image", 4)]], [1, 0]),
        ([[("image", 3)], [("image", 4)]], [0, 0]),
        ([[("marker", 1), ("image", 2)]] * 2, [0, 0]),
    ],
)
def test_documents_that_differ_share_no_slots(documents, lengths):
    """Their key ranges could decrease from one query to the next; kernels rely on non-decreasing ranges."""
    with pytest.raises(ValueError, match="documents 0 and 1 both begin at slot 4 of the cache"):
        TokenLayout.from_spans(documents, cached_lengths=lengths, cache_starts=[4, 4], cache_slots=20)


@pytest.mark.parametrize(
    ("modality", "document", "message"),
    [
        ([0, 0], [0, 0, 0], "one entry per token, got 2, 3 and 2"),
        ([0, 3], [0, 0], "got 3"),
        ([0, -1], [0, 0], "got -1"),
        ([0, 0], [1, 0], "must not decrease"),
    ],
)
def test_bad_ids(modality, document, message):
    with pytest.raises(ValueError, match=message):
        TokenLayout.from_modality_ids(modality, document, [0, 0])


def test_documents_may_be_any_iterables():
    documents = [[("text", 3), ("image", 4)], [("marker", 1)]]
    layout = TokenLayout.from_spans(documents)
    assert_equal_layouts(TokenLayout.from_spans(iter(documents)), layout)
    assert_equal_layouts(TokenLayout.from_spans(iter(document) for document in documents), layout)
    assert_equal_layouts(TokenLayout.from_spans([[[modality, n] for modality, n in d] for d in documents]), layout)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_rows_are_floating_point_numbers(dtype):
    layout = TokenLayout.from_spans([[("text", 2), ("image", 3)]])
    x = torch.ones(5, 4, dtype=dtype)
    with pytest.raises(ValueError, match=rf"qkv must be in one of float32, bfloat16, float16, float64, got {dtype}"):
        layout.check_rows(x, name="qkv")
    assert layout.to_sequence_order(layout.to_tower_order(x)).dtype == dtype  # whatever moves, as token ids


def test_numpy_lengths_and_an_empty_batch():
    assert TokenLayout.from_spans([[("text", np.int64(3))]]).num_tokens == 3
    empty = TokenLayout.from_spans([])
    assert (empty.num_tokens, empty.num_documents, empty.num_keys) == (0, 0, 0)
    assert reference.hybrid_mask(empty).shape == (0, 0)


@needs_native
def test_a_large_batch_takes_less_than_5_ms():
    document = [("text", 20), ("marker", 1), ("image", 64), ("marker", 1), ("text", 14)]
    documents = [document] * 1000
    times = []
    for _ in range(30):
        start = time.perf_counter()
        layout = TokenLayout.from_spans(documents)
        times.append(time.perf_counter() - start)
    assert layout.num_tokens == 100_000
    assert min(times) < 5e-3, f"{min(times) * 1e3:.1f} ms"
