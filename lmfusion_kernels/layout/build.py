"""Builds layouts and packings on the host, numpy in and out: by the compiled module if there is one, else in numpy."""

import bisect
import heapq
import itertools

import numpy as np

try:
    from lmfusion_kernels import _layout_native
except ImportError:
    _layout_native = None  # type: ignore[assignment]

_IMAGE = 1
_FULL, _HIDDEN = 1, 2
_MAX_TOKENS = 2**31 - 1


def build_layout(
    kinds: np.ndarray,
    lengths: np.ndarray,
    documents: np.ndarray,
    frozen_text: bool,
    cached_lengths: np.ndarray | None = None,
    cache_starts: np.ndarray | None = None,
    cache_slots: int = 0,
    segments: np.ndarray | None = None,
    modes: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The vectors and counts of `TokenLayout` from S spans.

    kinds uint8 [S] (0 text, 1 image, 2 marker), lengths int32 [S], documents int32 [S] (non-decreasing from 0),
    cached_lengths and cache_starts int32 [num_documents], or None without a cache; cache_slots: the slots of the cache.
    segments int32 [S] (ascending from 0 by steps of 0 or 1) and modes uint8 [S] (1 full, 2 hidden, added up): spans of
    one segment belong to one document and have one mode; None if every span is a segment, images full and none hidden.
    The arguments are not checked. All vectors of the result are int32.

    Raises ValueError if there are more tokens than int32 can count.
    """
    num_tokens = int(lengths.sum(dtype=np.int64))
    if num_tokens > _MAX_TOKENS:
        raise ValueError(f"a batch must have at most {_MAX_TOKENS} tokens, got {num_tokens}; split it")
    if _layout_native is not None:
        return _layout_native.build_layout(
            kinds, lengths, documents, frozen_text, cached_lengths, cache_starts, cache_slots, segments, modes
        )
    return build_layout_numpy(
        kinds, lengths, documents, frozen_text, cached_lengths, cache_starts, cache_slots, segments, modes
    )


def build_layout_numpy(
    kinds: np.ndarray,
    lengths: np.ndarray,
    documents: np.ndarray,
    frozen_text: bool,
    cached_lengths: np.ndarray | None = None,
    cache_starts: np.ndarray | None = None,
    cache_slots: int = 0,
    segments: np.ndarray | None = None,
    modes: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """`build_layout` in numpy: its specification, and its replacement if nothing was compiled."""
    num_tokens = int(lengths.sum())
    index = np.arange(num_tokens, dtype=np.int32)
    span_end = np.cumsum(lengths).astype(np.int32)
    span_start = span_end - lengths
    num_documents = int(documents.max(initial=-1)) + 1
    document_start = np.zeros(num_documents, np.int32)
    document_end = np.zeros(num_documents, np.int32)
    # Of several values for one index, numpy keeps the last: reversed, that is the document's first span.
    document_start[documents[::-1]] = span_start[::-1]
    document_end[documents] = span_end

    if segments is None or modes is None:
        segments, modes = np.arange(len(kinds), dtype=np.int32), np.where(kinds == _IMAGE, _FULL, 0).astype(np.uint8)
    first_span = np.flatnonzero(np.diff(segments, prepend=-1))  # by segment, as the next four
    segment_start, segment_size = (
        span_start[first_span],
        np.add.reduceat(lengths, first_span) if len(kinds) else lengths,
    )
    segment_end = segment_start + segment_size.astype(np.int32)
    is_full_segment, is_hidden_segment = (modes[first_span] & bit > 0 for bit in (_FULL, _HIDDEN))

    kind = np.repeat(kinds, lengths)  # by token, as everything below
    document = np.repeat(documents, lengths)
    segment = np.repeat(segments, lengths)
    is_image, is_full, is_hidden = kind == _IMAGE, is_full_segment[segment], is_hidden_segment[segment]
    first_key = document_start[document]
    end_key = np.where(is_full, segment_end[segment], index + 1).astype(np.int32)
    position = index - first_key

    is_constant = np.zeros(num_tokens, bool)
    if frozen_text and cached_lengths is None:  # a cached layout has no backward to leave tokens out of
        # Tokens before the first image, marker or full segment of their document; all of them if there is none.
        first_trained = document_end.copy()
        trained_spans = np.flatnonzero((kinds != 0) | (modes & _FULL > 0))[::-1]
        first_trained[documents[trained_spans]] = span_start[trained_spans]
        is_constant = index < first_trained[document]
    constant, image = np.flatnonzero(is_constant), np.flatnonzero(is_image)
    live = np.flatnonzero(~is_constant & ~is_image)
    tower_to_sequence = np.concatenate([constant, live, image]).astype(np.int32)
    sequence_to_tower = np.empty(num_tokens, np.int32)
    sequence_to_tower[tower_to_sequence] = index
    num_constant = constant.size

    first_query = np.where(is_full, segment_start[segment], index).astype(np.int32)
    end_query = np.where(is_hidden, segment_end[segment], document_end[document]).astype(np.int32)
    active = np.flatnonzero(~is_constant).astype(np.int32)
    # rank_before[i]: how many active tokens lie before sequence index i. It also maps a boundary to the active tokens.
    rank_before = np.concatenate([[0], np.cumsum(~is_constant)]).astype(np.int32)
    query_row = np.concatenate([index[:num_constant], num_constant + rank_before[tower_to_sequence[num_constant:]]])

    # All tokens of an image or full segment except the last see later tokens of it. List them in reverse.
    triangles = np.flatnonzero(is_full_segment & (segment_size > 1))
    triangle_sizes = segment_size[triangles] - 1
    triangle_start = np.concatenate([[0], np.cumsum(triangle_sizes)]).astype(np.int32)
    step = np.arange(triangle_start[-1], dtype=np.int32) - np.repeat(triangle_start[:-1], triangle_sizes)
    triangle_row = np.repeat(segment_end[triangles] - 2, triangle_sizes) - step

    document_bounds = np.append(document_start, num_tokens)
    document_key_start = document_bounds
    document_num_keys = document_end - document_start
    active_document_start = rank_before[document_bounds]

    key_slot = index
    no_queries = np.empty(0, np.int32)
    if cached_lengths is not None and cache_starts is not None:
        # Keys are numbered by cache slot from here on, and each document's cached tokens come before its new ones.
        position = position + cached_lengths[document]
        slot_start = cache_starts[document]
        key_slot = slot_start + position
        end_key = end_key - first_key + slot_start + cached_lengths[document]
        first_key = slot_start
        document_key_start = np.append(cache_starts, cache_slots)
        document_num_keys = document_num_keys + cached_lengths
    vectors = {
        "tower_to_sequence": tower_to_sequence,
        "sequence_to_tower": sequence_to_tower,
        "position": position,
        "key_start": first_key,
        "key_end": end_key,
        "query_start": first_query if cached_lengths is None else no_queries,
        "query_end": end_query if cached_lengths is None else no_queries,
        "key_slot": key_slot,
        "query_row": query_row,
        "constant_key_start": first_key[constant],
        "constant_key_end": end_key[constant],
        "active_key_start": first_key[active],
        "active_key_end": end_key[active],
        "active_key": active,
        "active_query_start": rank_before[first_query[active]] if cached_lengths is None else no_queries,
        "active_query_end": rank_before[end_query[active]] if cached_lengths is None else no_queries,
        "active_row": sequence_to_tower[active] - np.int32(num_constant),
        "document_start": document_bounds,
        "document_key_start": document_key_start,
        "document_num_keys": document_num_keys,
        "active_document_start": active_document_start,
        "triangle_start": triangle_start,
        "triangle_row": triangle_row,
        "active_triangle_row": rank_before[triangle_row],
    }
    if is_hidden.any():
        hidden_starts = np.append(segment_start[is_hidden_segment], num_tokens)
        next_hidden = hidden_starts[np.searchsorted(hidden_starts[:-1], index)]
        active_end = rank_before[end_query]
        vectors |= {
            "visible_end": end_query,
            "constant_visible_end": end_query - active_end,
            "active_visible_end": active_end,
            "run_end": np.where(is_hidden, end_query, np.minimum(next_hidden, end_query)),
            **_causal_segments(is_hidden, is_constant, document_bounds, segment_start[is_hidden_segment], end_query),
        }
    else:
        vectors |= dict.fromkeys(_HIDDEN_VECTORS, no_queries)
    vectors = {name: np.ascontiguousarray(vector, np.int32) for name, vector in vectors.items()}
    counts = {
        "num_tokens": num_tokens,
        "num_text": num_tokens - image.size,
        "num_constant": int(num_constant),
        "longest_active": int(np.diff(active_document_start).max(initial=0)),
        "longest_triangle": int(triangle_sizes.max(initial=0)),
    }
    return vectors, counts


# The key "part" of these names is short for causal segment (HiddenSpans in masks.py).
_HIDDEN_VECTORS = (
    "visible_end", "constant_visible_end", "active_visible_end", "run_end", "part_start", "part_row",
    "part_key_start", "part_key", "active_part_start", "active_part_row", "constant_part_row", "constant_part_num_keys",
)  # fmt: skip


def _causal_segments(
    is_hidden: np.ndarray,
    is_constant: np.ndarray,
    document_bounds: np.ndarray,
    hidden_starts: np.ndarray,
    end_query: np.ndarray,
) -> dict[str, np.ndarray]:
    """The vectors of a layout's causal segments. Queries and keys are listed segment by segment."""
    queries, keys, constant_keys = [], [], []
    for start, end in itertools.pairwise(document_bounds.tolist()):
        visible = start + np.flatnonzero(~is_hidden[start:end])
        queries.append(visible)
        keys.append(visible)
        constant_keys.append(is_constant[visible].sum())
        for first in hidden_starts[(hidden_starts >= start) & (hidden_starts < end)]:
            rows = np.arange(first, end_query[first])
            queries.append(rows)
            keys.append(np.concatenate([visible[visible < first], rows]))
            constant_keys.append(keys[-1].size if is_constant[first] else 0)
    rank, constant_rank = np.cumsum(~is_constant) - 1, np.cumsum(is_constant) - 1
    active = [rank[rows[~is_constant[rows]]] for rows in queries]
    query = np.concatenate(queries)
    return {
        "part_start": _starts(queries),
        "part_row": query,
        "part_key_start": _starts(keys),
        "part_key": np.concatenate(keys),
        "active_part_start": _starts(active),
        "active_part_row": np.concatenate(active),
        "constant_part_row": constant_rank[query[is_constant[query]]],
        "constant_part_num_keys": np.array(constant_keys),
    }


def _starts(lists: list[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *(rows.size for rows in lists)])


def pack(lengths: np.ndarray, capacity: int, window: int) -> list[np.ndarray]:
    """The sequences of `pack_documents`. lengths int64 [n], each in 1..capacity."""
    if _layout_native is not None:
        return _layout_native.pack(lengths, capacity, window)
    return pack_python(lengths, capacity, window)


def pack_python(lengths: np.ndarray, capacity: int, window: int) -> list[np.ndarray]:
    """`pack` in Python: its specification, and its replacement if nothing was compiled."""
    packed: list[list[int]] = []
    for begin in range(0, len(lengths), window):
        here = lengths[begin : begin + window]
        by_length = (np.argsort(-here, kind="stable") + begin).tolist()
        sequences = _best_fit(lengths, by_length, capacity)
        sequences = _deal(lengths, by_length, capacity, len(sequences)) or sequences
        packed += sorted(sorted(sequence) for sequence in sequences)
    return [np.array(sequence, np.int64) for sequence in packed]


def _best_fit(lengths: np.ndarray, order: list[int], capacity: int) -> list[list[int]]:
    """The documents of `order`, each in the fullest sequence that still has room for it."""
    sequences: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, sequence), sorted: the first that is large enough is the best fit
    for document in order:
        length = int(lengths[document])
        best = bisect.bisect_left(room, (length, 0))
        if best < len(room):
            free, sequence = room.pop(best)
        else:
            free, sequence = capacity, len(sequences)
            sequences.append([])
        sequences[sequence].append(document)
        bisect.insort(room, (free - length, sequence))
    return sequences


def _deal(lengths: np.ndarray, order: list[int], capacity: int, num_sequences: int) -> list[list[int]] | None:
    """The documents of `order`, each in the emptiest of `num_sequences` sequences; None if one does not fit there."""
    emptiest = [(0, sequence) for sequence in range(num_sequences)]  # (tokens, sequence)
    sequences: list[list[int]] = [[] for _ in range(num_sequences)]
    for document in order:
        used, sequence = emptiest[0]
        used += int(lengths[document])
        if used > capacity:
            return None
        heapq.heapreplace(emptiest, (used, sequence))
        sequences[sequence].append(document)
    return sequences


def instruction_set() -> str | None:
    """What the CPU kernels use here: "avx512", "avx2" or "baseline"; None if nothing was compiled."""
    return None if _layout_native is None else _layout_native.instruction_set()
