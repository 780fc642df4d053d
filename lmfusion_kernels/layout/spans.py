"""Parses the spans of a batch into arrays and validates them."""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np

TEXT, IMAGE, MARKER = 0, 1, 2
MODALITIES = {"text": TEXT, "image": IMAGE, "marker": MARKER}

FULL, HIDDEN = 1, 2
"""Bits of a segment's mode: its tokens see all of it; no token outside sees it."""

Document = Iterable[Any]
"""Spans: (modality, length), or ("full", [such pairs]); with "hidden" as a third element where they are hidden."""

SPANS_EXPECTED = (
    "a batch is a list of documents, a document a list of pairs (modality, length): "
    "from_spans([[('text', 3), ('image', 256)], [('text', 5)]]); a hidden span is (modality, length, 'hidden'), spans "
    "whose tokens all see each other are ('full', [pairs])"
)


@dataclass(frozen=True, eq=False)
class Spans:
    """The spans of a batch, S of them."""

    kinds: np.ndarray
    """uint8 [S]"""
    lengths: np.ndarray
    """int64 [S]"""
    documents: np.ndarray
    """int32 [S], non-decreasing from 0."""
    segments: np.ndarray | None = None
    """int32 [S], ascending from 0: spans of one number are one segment. None: all apart, images full, none hidden."""
    modes: np.ndarray | None = None
    """uint8 [S] of FULL and HIDDEN, equal within a segment."""

    @classmethod
    def of(cls, documents: list[list[Any]]) -> "Spans":
        """The spans of documents as a caller writes them. Raises ValueError that names the first fault.

        Well-formed batches without "full" and "hidden" take the fast way; faults are looked for only after it failed.
        """
        number = np.repeat(np.arange(len(documents), dtype=np.int32), [len(document) for document in documents])
        spans = [span for document in documents for span in document]
        try:
            kinds, lengths = _pairs(spans)
            result = cls(kinds, lengths, number)
        except (KeyError, TypeError, ValueError, OverflowError):
            result = cls._of_segments(documents)
        if not all(documents) or result.lengths.min(initial=1) <= 0:
            raise ValueError(_first_fault(documents))
        return result

    @classmethod
    def _of_segments(cls, documents: list[list[Any]]) -> "Spans":
        """The same for documents in which spans may be hidden or joined."""
        if fault := _first_fault(documents):
            raise ValueError(fault)
        pairs, sizes, modes, numbers = [], [], [], []
        for d, document in enumerate(documents):
            for name, inner, *hidden in document:
                members = list(inner) if name == "full" else [(name, inner)]
                pairs += members
                sizes.append(len(members))
                numbers.append(d)
                modes.append(FULL * (name in ("full", "image")) + HIDDEN * bool(hidden))
        try:
            kinds, lengths = _pairs(pairs)
        except OverflowError:
            raise ValueError("the length of a span must fit into 64 bits; split it") from None
        segments = np.arange(len(sizes), dtype=np.int32)
        number, segment, mode = (
            np.repeat(np.array(x, dtype), sizes)
            for x, dtype in ((numbers, np.int32), (segments, np.int32), (modes, np.uint8))
        )
        return cls(kinds, lengths, number, segment, mode)

    def totals(self, num_documents: int) -> np.ndarray:
        """int64 [num_documents]: tokens of each document."""
        return np.bincount(self.documents, self.lengths, num_documents).astype(np.int64)


def _pairs(spans: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """uint8 and int64, by span."""
    kinds = np.array([MODALITIES[modality] for modality, _ in spans], np.uint8)
    return kinds, np.array([index(length) for _, length in spans], np.int64)


def _first_fault(documents: list[list[Any]]) -> str:
    """The first fault in documents; empty if they have none."""
    for d, document in enumerate(documents):
        if not document:
            return f"document {d} must have at least one span, got none; leave it out of the batch"
        for span in document:
            try:
                modality, length, *hidden = span
                is_span = not isinstance(span, str) and hidden in ([], ["hidden"])
            except (TypeError, ValueError):
                is_span = False
            if not is_span:
                return f"document {d}: a span must be (modality, length), got {span!r}; {SPANS_EXPECTED}"
            if modality != "full":
                fault = _span_fault(modality, length)
            elif not isinstance(length, list | tuple) or not length:
                fault = f"'full' must join a list of spans, got {span!r}; {SPANS_EXPECTED}"
            else:
                fault = next(filter(None, (_pair_fault(pair) for pair in length)), "")
            if fault:
                return f"document {d}: {fault}"
    return ""


def _pair_fault(pair: Any) -> str:
    """The fault in a span that is joined with others."""
    try:
        modality, length = pair
        is_pair = not isinstance(pair, str)
    except (TypeError, ValueError):
        is_pair = False
    return _span_fault(modality, length) if is_pair else f"'full' must join pairs, got {pair!r}; {SPANS_EXPECTED}"


def _span_fault(modality: Any, length: Any) -> str:
    if not isinstance(modality, str) or modality not in MODALITIES:
        return f"the modality of a span must be one of {', '.join(MODALITIES)}, got {modality!r}"
    try:
        length = index(length)
    except TypeError:
        return f"the length of a span must be an integer, got {length!r}"
    return f"the length of a span must be positive, got {(modality, length)!r}" if length <= 0 else ""
