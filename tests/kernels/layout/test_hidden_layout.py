"""Hidden spans and full segments of a TokenLayout against their definition, token by token; builders; bad input."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmfusion_kernels import TokenLayout, reference
from lmfusion_kernels.layout import build
from lmfusion_kernels.layout.spans import FULL, HIDDEN
from tests.kernels.layout.test_token_layout import assert_equal_layouts

MODALITIES = ("text", "image", "marker")
needs_native = pytest.mark.skipif(build._layout_native is None, reason="_layout_native was not compiled")

pairs = st.tuples(st.sampled_from(MODALITIES), st.integers(1, 5))
shown = st.one_of(pairs, st.tuples(st.just("full"), st.lists(pairs, min_size=1, max_size=3)))
spans = st.tuples(shown, st.booleans()).map(lambda pair: (*pair[0], "hidden") if pair[1] else pair[0])
batches = st.lists(st.lists(spans, min_size=1, max_size=6), max_size=4)


def tokens_of(documents):
    """(modality, document, segment, is full, is hidden) of every token, in sequence order."""
    tokens, segments = [], itertools.count()
    for d, document in enumerate(documents):
        for name, inner, *hidden in document:
            segment = next(segments)
            for modality, length in inner if name == "full" else [(name, inner)]:
                tokens += [(modality, d, segment, name in ("full", "image"), bool(hidden))] * length
    return tokens


def visible(tokens):
    """Bool [N, N] by the definition: query i sees key j."""
    mask = np.zeros((len(tokens), len(tokens)), bool)
    for i, (_, document, segment, _, _) in enumerate(tokens):
        for j, (_, other_document, other_segment, is_full, is_hidden) in enumerate(tokens):
            is_own = segment == other_segment
            seen = (j <= i and (is_own or not is_hidden)) or (is_own and is_full)
            mask[i, j] = document == other_document and seen
    return mask


def constant_tokens(tokens, frozen_text):
    """Bool [N]: text before the first image, marker or full segment of its document, hidden or not."""
    trained, result = set(), []
    for modality, document, _, is_full, _ in tokens:
        if modality != "text" or is_full:
            trained.add(document)
        result.append(frozen_text and document not in trained)
    return np.array(result, bool)


def by_ranges(starts, ends, num_columns):
    column = np.arange(num_columns)
    return (column >= starts.numpy()[:, None]) & (column < ends.numpy()[:, None])


def seen_by_query(starts, ends, visible_end):
    """Bool [queries, N]: ranges of keys, except keys that end before the query."""
    mask = by_ranges(starts, ends, visible_end.shape[0])
    return mask & (np.arange(len(starts))[:, None] < visible_end.numpy())


@given(batches.filter(bool), st.booleans())
def test_mask_by_query_and_by_key(documents, frozen_text):
    layout = TokenLayout.from_spans(documents, frozen_text=frozen_text)
    tokens = tokens_of(documents)
    mask, is_constant = visible(tokens), constant_tokens(tokens, frozen_text)
    active = np.flatnonzero(~is_constant)
    assert layout.has_hidden == any(is_hidden for *_, is_hidden in tokens)
    assert layout.num_constant == is_constant.sum() and layout.active.key.tolist() == active.tolist()
    assert layout.num_image == sum(modality == "image" for modality, *_ in tokens)
    assert (reference.hybrid_mask(layout).numpy() == mask).all()
    assert (by_ranges(layout.mask.query_start, layout.mask.query_end, layout.num_tokens) == mask.T).all()
    by_key = by_ranges(layout.active.query_start, layout.active.query_end, len(active))
    assert (by_key == mask[np.ix_(active, active)].T).all()
    for queries in (layout.mask, layout.active):
        for name in ("key_start", "key_end", "query_start"):
            assert (getattr(queries, name).diff() >= 0).all(), name
    if layout.has_hidden:
        queries = layout.key_start, layout.key_end
        active_queries, constant = (layout.active.key_start, layout.active.key_end), mask[is_constant]
        constant_queries = layout.constant.key_start, layout.constant.key_end
        assert (seen_by_query(*queries, layout.mask.visible_end) == mask).all()
        assert (seen_by_query(*active_queries, layout.active.visible_end) == mask[active]).all()
        assert (seen_by_query(*constant_queries, layout.constant.visible_end) == constant).all()


@given(batches, st.booleans())
def test_runs_are_keys_alike(documents, frozen_text):
    """A run ends where the next key's visible_end differs, or where a hidden segment begins."""
    layout = TokenLayout.from_spans(documents, frozen_text=frozen_text)
    tokens = tokens_of(documents)
    if not layout.has_hidden:
        assert layout.hidden.run_end.shape[0] == layout.mask.visible_end.shape[0] == 0
        return
    ends, alike = (
        layout.hidden.run_end.tolist(),
        [(d, segment if hidden else None) for _, d, segment, _, hidden in tokens],
    )
    for j in range(len(tokens)):
        end = next((i for i in range(j, len(tokens)) if alike[i] != alike[j]), len(tokens))
        assert ends[j] == end
        assert len({layout.active.visible_end[i].item() for i in range(j, end)}) == 1


@given(batches, st.booleans())
def test_causal_segments_and_triangles_are_the_mask(documents, frozen_text):
    """Causal segments, whose last query sees the last key, and the triangles give every visible pair once."""
    layout = TokenLayout.from_spans(documents, frozen_text=frozen_text)
    hidden = layout.hidden
    if not layout.has_hidden:
        assert hidden.segment_start.shape[0] == hidden.segment_key.shape[0] == 0
        return
    tokens = tokens_of(documents)
    n, mask, is_constant = len(tokens), visible(tokens), constant_tokens(tokens, frozen_text)
    rows_of = {
        "all": (hidden.segment_query, hidden.segment_start, np.arange(n)),
        "active": (
            hidden.active_segment_query,
            hidden.active_segment_start,
            np.flatnonzero(~is_constant),
        ),
        "constant": (
            hidden.constant_segment_query,
            hidden.segment_start - hidden.active_segment_start,
            np.flatnonzero(is_constant),
        ),
    }
    for name, (rows, starts, sequence) in rows_of.items():
        counted = np.zeros((n, n), int)
        assert sorted(rows.tolist()) == list(range(len(sequence)))
        for segment, (start, end) in enumerate(itertools.pairwise(starts.tolist())):
            keys = hidden.segment_key[
                hidden.segment_key_start[segment] : hidden.segment_key_start[segment + 1]
            ].tolist()
            if name == "constant":
                keys = keys[: hidden.constant_num_keys[segment]]
            queries = sequence[rows.numpy()[start:end]]
            counted[np.ix_(queries, keys)] += np.tri(len(queries), len(keys), len(keys) - len(queries), dtype=int)
        triangles = layout.causal.triangle_query.tolist()
        for start, end in itertools.pairwise(layout.causal.triangle_start.tolist()):
            queries = triangles[start:end]
            counted[np.ix_(queries, [row + 1 for row in queries])] += np.tri(end - start, dtype=int)
        assert (counted[sequence] == mask[sequence]).all(), name


@needs_native
@given(batches, st.booleans())
def test_compiled_builder_equals_numpy(documents, frozen_text):
    segments, sizes, modes, numbers, members = 0, [], [], [], []
    for d, document in enumerate(documents):
        for name, inner, *hidden in document:
            here = inner if name == "full" else [(name, inner)]
            members += here
            sizes += [segments] * len(here)
            modes += [FULL * (name in ("full", "image")) + HIDDEN * bool(hidden)] * len(here)
            numbers += [d] * len(here)
            segments += 1
    kinds = np.array([MODALITIES.index(modality) for modality, _ in members], np.uint8)
    arguments = (
        kinds, np.array([length for _, length in members], np.int32), np.array(numbers, np.int32), frozen_text, None,
        None, 0, np.array(sizes, np.int32), np.array(modes, np.uint8),
    )  # fmt: skip
    vectors, counts = build._layout_native.build_layout(*arguments)
    expected, expected_counts = build.build_layout_numpy(*arguments)
    assert counts == expected_counts and vectors.keys() == expected.keys()
    for name, vector in vectors.items():
        assert vector.dtype == np.int32, name
        np.testing.assert_array_equal(vector, expected[name], err_msg=name)


def test_a_segment_of_one_image_is_an_image():
    """And joined text at the start of a document sees all of itself, in the text tower."""
    plain = TokenLayout.from_spans([[("text", 3), ("image", 4), ("text", 1)]])
    assert_equal_layouts(TokenLayout.from_spans([[("text", 3), ("full", [("image", 4)]), ("text", 1)]]), plain)
    understanding = TokenLayout.from_spans([[("full", [("text", 4)]), ("text", 2)]])
    assert reference.hybrid_mask(understanding)[:4, :4].all() and understanding.num_image == 0
    assert understanding.num_live == 6


def test_full_segments_with_a_cache():
    """They are ordinary context; only hidden spans cannot be kept."""
    document = [("text", 2), ("full", [("marker", 1), ("image", 3), ("marker", 1)]), ("text", 2)]
    whole = reference.hybrid_mask(TokenLayout.from_spans([document]))
    place = {"cache_starts": [3], "cache_slots": 20}
    rest = TokenLayout.from_spans([document[1:]], cached_lengths=[2], **place)
    assert (reference.hybrid_mask(rest)[:, 3:12] == whole[2:]).all()
    message = "document 0 has a hidden span, which later tokens would see.*leave out the cache"
    with pytest.raises(ValueError, match=message):
        TokenLayout.from_spans([[("image", 3, "hidden")]], cached_lengths=[2], **place)


@given(st.lists(st.lists(st.tuples(pairs, st.booleans()), min_size=1, max_size=5), max_size=3))
def test_hidden_ids_give_the_layout_of_the_spans(documents):
    spans = [[(*pair, "hidden") if hidden else pair for pair, hidden in document] for document in documents]
    flat = [(d, *pair, hidden) for d, document in enumerate(documents) for pair, hidden in document]
    ids = [
        (MODALITIES.index(modality), d, number, number if hidden else -1)
        for number, (d, modality, length, hidden) in enumerate(flat)
        for _ in range(length)
    ]
    modality, document, image, hidden = (list(column) for column in zip(*ids, strict=True)) if ids else ([], [], [], [])
    layout = TokenLayout.from_modality_ids(modality, document, image, hidden_ids=torch.tensor(hidden))
    assert_equal_layouts(layout, TokenLayout.from_spans(spans))


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[("image", 4, "hide")]], r"document 0: .*got \('image', 4, 'hide'\).*\(modality, length, 'hidden'\)"),
        ([[("image", 4, "hidden", 1)]], r"got \('image', 4, 'hidden', 1\)"),
        ([[("text", 1)], [("full", 3)]], r"document 1: 'full' must join a list of spans, got \('full', 3\)"),
        ([[("full", [])]], r"'full' must join a list of spans, got \('full', \[\]\)"),
        ([[("full", [("audio", 3)])]], "modality of a span must be .*, got 'audio'"),
        ([[("full", [("image", 3, "hidden")])]], r"'full' must join pairs, got \('image', 3, 'hidden'\)"),
        ([[("full", [("full", [("image", 3)])])]], "modality of a span must be .*, got 'full'"),
        ([[("full", [("text", 0)], "hidden")]], r"length of a span must be positive, got \('text', 0\)"),
        ([[("image", 0, "hidden")]], r"length of a span must be positive, got \('image', 0\)"),
        ([[("image", 2**64, "hidden")]], "must fit into 64 bits"),
    ],
)
def test_bad_spans(documents, message):
    with pytest.raises(ValueError, match=message):
        TokenLayout.from_spans(documents)


def test_bad_hidden_ids():
    with pytest.raises(ValueError, match="hidden_ids must have one entry per token, 3, got 2"):
        TokenLayout.from_modality_ids([0, 1, 1], [0, 0, 0], [0, 0, 0], hidden_ids=[-1, 0])
    with pytest.raises(
        ValueError, match=r"hidden_ids has 7 on both sides of token 1, where another span begins; .*full"
    ):
        TokenLayout.from_modality_ids([2, 1, 1], [0, 0, 0], [0, 0, 0], hidden_ids=[7, 7, 7])
