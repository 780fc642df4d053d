"""The pieces of a `TokenLayout`: its counts, the order of its tokens, and the mask in the forms that kernels read.

Every vector is int32. In brackets: its length, for N tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayoutCounts:
    """Numbers that the host knows, so that no op has to wait for the device."""

    num_tokens: int
    num_text: int
    """Tokens of the text tower: constant and live."""
    num_live: int
    """Text tokens that are not constant. Stored in place of num_constant, which often equals num_text: torch.compile
    takes equal numbers for one and loses track of it in stacked blocks."""
    num_keys: int
    """Rows of the key buffer: num_tokens, or the slots of the key-value cache if there is one."""
    num_documents: int
    longest_document: int
    """Tokens of the longest document, including those in the cache. An upper bound for ops: see `bounded`."""
    longest_active: int
    """The most active tokens of any document; with a cache, the most new tokens."""
    longest_triangle: int
    """Tokens of the longest triangle (see `CausalDocuments`)."""
    is_cached: bool
    """Whether keys live in a cache that also holds earlier tokens. Such a layout has no backward."""


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """The two orders of the tokens, and RoPE positions."""

    tower_to_sequence: Tensor
    """[N] sequence index of each token in tower order."""
    sequence_to_tower: Tensor
    """[N] tower index of each token in sequence order."""
    position: Tensor
    """[N] RoPE position in sequence order: one running count per document."""
    query_row: Tensor
    """[N] by tower index: a constant token's own index, or num_constant + rank of an active token."""


@dataclass(frozen=True, eq=False)
class TokenMask:
    """The mask for one set of queries: all tokens, the active ones (which have a backward), or the constant ones.

    Query i of the set sees the keys [key_start[i], key_end[i]), except keys of other hidden spans; key number j of
    `key` is seen by the queries [query_start[j], query_end[j]). Vectors do not decrease, except query_end with hidden
    spans. Queries are counted within the set and in sequence order: an active token's number is its *rank*.
    """

    key_start: Tensor
    """[queries]"""
    key_end: Tensor
    """[queries]"""
    visible_end: Tensor
    """[N], or empty if nothing is hidden: from this query on, the key (by sequence index) is unseen. That is the end of
    the key's segment if the segment is hidden, otherwise the end of its document."""
    key: Tensor | None = None
    """[queries] row of the key buffer of each token of the set: the keys that get gradients. None for constant tokens,
    which have no backward."""
    query_start: Tensor | None = None
    """[queries], or empty with a cache, which has no backward. None like key."""
    query_end: Tensor | None = None
    out_row: Tensor | None = None
    """[queries] for active tokens, their row in [live | image] order, that is tower index minus num_constant; None: the
    results stay in sequence order."""


@dataclass(frozen=True, eq=False)
class CausalDocuments:
    """The mask for kernels with packed causal attention: causal documents, and for each image the *triangle* of pairs
    that causality leaves out.

    The tokens of an image except the last, reversed, see its tokens except the first, reversed, causally:

        image of 4 tokens: c causal, t triangle         the triangle, both orders reversed
            key    0 1 2 3                                  key    3 2 1
        query 0    c t t t                              query 2    t
              1    c c t t                                    1    t t
              2    c c c t                                    0    t t t
              3    c c c c

    A full segment (spans that all see each other) has a triangle like an image.
    """

    start: Tensor
    """[num_documents + 1] first token of each document, then N."""
    active_start: Tensor
    """[num_documents + 1] rank of the first active token of each document, then num_active."""
    key_start: Tensor
    """[num_documents + 1] row of the key buffer where each document begins, then num_keys. In a cache a document may
    end before the next one starts: num_keys says how far it goes."""
    num_keys: Tensor
    """[num_documents] tokens of each document, including those in the cache."""
    triangle_start: Tensor
    """[triangles + 1] where in triangle_query each triangle begins, then its size."""
    triangle_query: Tensor
    """Sequence indices of the queries of all triangles. Query and key of one place are neighbours: its key is the next
    token, triangle_query + 1."""
    active_triangle_query: Tensor
    """The same queries by rank."""


@dataclass(frozen=True, eq=False)
class HiddenSpans:
    """What hidden spans add; all vectors are empty if nothing is hidden.

    The causal documents become S *causal segments*, each causal attention whose last query sees the last key: the
    visible tokens of each document, then each of its hidden segments, whose keys are the visible tokens before it and
    its own.
    """

    run_end: Tensor
    """[N] by key: the end of its run of keys with one visible_end. A run is a hidden segment, or what lies between two
    of them, within a document."""
    segment_start: Tensor
    """[S + 1] where in segment_query each causal segment begins, then N."""
    segment_query: Tensor
    """[N] sequence indices of the queries, segment by segment."""
    segment_key_start: Tensor
    """[S + 1] where in segment_key each causal segment begins, then its size."""
    segment_key: Tensor
    """Sequence indices of the keys, segment by segment; visible keys before hidden segments occur again in each."""
    active_segment_start: Tensor
    """[S + 1] like segment_start, counting active tokens only."""
    active_segment_query: Tensor
    """[num_active] the active queries by rank, segment by segment."""
    constant_segment_query: Tensor
    """[num_constant] the constant queries by their number among the constant tokens, segment by segment."""
    constant_num_keys: Tensor
    """[S] how many keys of each causal segment its constant queries need: the first ones."""


def _mask(prefix: str, *more: tuple[str, str]) -> dict[str, str]:
    return {name: prefix + name for name in ("key_start", "key_end", "visible_end")} | dict(more)


def _with_backward(prefix: str) -> list[tuple[str, str]]:
    return [(name, prefix + name) for name in ("query_start", "query_end")]


PIECES: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "order": (TokenOrder, {field.name: field.name for field in fields(TokenOrder)}),
    "mask": (TokenMask, _mask("", ("key", "key_slot"), *_with_backward(""))),
    "active": (
        TokenMask,
        _mask("active_", ("key", "active_key"), *_with_backward("active_"), ("out_row", "active_row")),
    ),
    "constant": (TokenMask, _mask("constant_")),
    "causal": (
        CausalDocuments,
        {
            "start": "document_start",
            "active_start": "active_document_start",
            "key_start": "document_key_start",
            "num_keys": "document_num_keys",
            "triangle_start": "triangle_start",
            "triangle_query": "triangle_row",
            "active_triangle_query": "active_triangle_row",
        },
    ),
    "hidden": (
        HiddenSpans,
        {
            "run_end": "run_end",
            "segment_start": "part_start",
            "segment_query": "part_row",
            "segment_key_start": "part_key_start",
            "segment_key": "part_key",
            "active_segment_start": "active_part_start",
            "active_segment_query": "active_part_row",
            "constant_segment_query": "constant_part_row",
            "constant_num_keys": "constant_part_num_keys",
        },
    ),
}
"""The pieces of a layout: the class, and by field the name under which the builders (build.py) return its vector."""

BUILDER_NAMES = {f"{piece}_{field}": name for piece, (_, names) in PIECES.items() for field, name in names.items()}
"""Every vector of a layout, as "active_key_start", with its builder's name."""


def make_piece(piece: str, vector: Callable[[str], Any]) -> Any:
    """The piece of this name from its vectors: `vector("active_key_start")` returns one."""
    make, names = PIECES[piece]
    return make(**{field: vector(f"{piece}_{field}") for field in names})


# torch.export.load reads the example inputs of a program, which hold such objects, without unsafe unpickling.
torch.serialization.add_safe_globals([LayoutCounts, TokenOrder, TokenMask, CausalDocuments, HiddenSpans])
