"""Which spans is a batch made of? What callers write, as arrays, and what is wrong with what is no batch."""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np

TEXT, IMAGE, MARKER = 0, 1, 2
MODALITIES = {"text": TEXT, "image": IMAGE, "marker": MARKER}

FULL, HIDDEN = 1, 2
"""Bits of a segment's mode: its rows see all of it; no row outside sees it."""

Document = Iterable[Any]
"""Spans: (modality, length), or ("full", [such pairs]); with "hidden" as a third element where they are hidden."""

SPANS_EXPECTED = (
    "a batch is a list of documents, a document a list of pairs (modality, length): "
    "from_spans([[('text', 3), ('image', 256)], [('text', 5)]]); a hidden span is (modality, length, 'hidden'), spans "
    "whose rows all see each other are ('full', [pairs])"
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
        """What does not fit is looked for, to be named, only when something does not."""
        number = np.repeat(np.arange(len(documents), dtype=np.int32), [len(document) for document in documents])
        spans = [span for document in documents for span in document]
        try:
            kinds, lengths = _pairs(spans)
            result = cls(kinds, lengths, number)
        except (KeyError, TypeError, ValueError, OverflowError):
            result = cls._of_segments(documents)
        if not all(documents) or result.lengths.min(initial=1) <= 0:
            raise ValueError(_what_is_wrong(documents))
        return result

    @classmethod
    def _of_segments(cls, documents: list[list[Any]]) -> "Spans":
        """The same where some spans are hidden, or joined."""
        if fault := _what_is_wrong(documents):
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
            raise ValueError("a span is longer than 64 bits can count; split it") from None
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


def _what_is_wrong(documents: list[list[Any]]) -> str:
    """The first fault in documents; empty if they have none."""
    for d, document in enumerate(documents):
        if not document:
            return f"document {d} has no spans; leave it out of the batch"
        for span in document:
            try:
                modality, length, *hidden = span
                is_span = not isinstance(span, str) and hidden in ([], ["hidden"])
            except (TypeError, ValueError):
                is_span = False
            if not is_span:
                return f"document {d} has the span {span!r}; {SPANS_EXPECTED}"
            if modality != "full":
                fault = _what_is_wrong_with(modality, length)
            elif not isinstance(length, list | tuple) or not length:
                fault = f"has the span {span!r}, which joins no list of spans; {SPANS_EXPECTED}"
            else:
                fault = next(filter(None, (_what_is_wrong_within(pair) for pair in length)), "")
            if fault:
                return f"document {d} {fault}"
    return ""


def _what_is_wrong_within(pair: Any) -> str:
    """The fault in a span that is joined with others."""
    try:
        modality, length = pair
        is_pair = not isinstance(pair, str)
    except (TypeError, ValueError):
        is_pair = False
    return _what_is_wrong_with(modality, length) if is_pair else f"joins the span {pair!r}; {SPANS_EXPECTED}"


def _what_is_wrong_with(modality: Any, length: Any) -> str:
    if not isinstance(modality, str) or modality not in MODALITIES:
        return f"has a span of unknown modality {modality!r}; known: {', '.join(MODALITIES)}"
    try:
        length = index(length)
    except TypeError:
        return f"has a span of length {length!r}; lengths are integers"
    return f"has a {modality} span of length {length}; lengths are positive" if length <= 0 else ""
