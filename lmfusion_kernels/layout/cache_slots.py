"""Checks the arguments of `TokenLayout.from_spans` that place documents in a key-value cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmfusion_kernels.layout.spans import HIDDEN, IMAGE, Spans

MAX_TOKENS = 2**31 - 1  # that int32 can count


@dataclass(frozen=True, eq=False)
class CacheSlots:
    """Where documents lie in a key-value cache. lengths and starts: int32 [num_documents]."""

    lengths: np.ndarray
    starts: np.ndarray
    num_slots: int

    @classmethod
    def from_arguments(
        cls,
        spans: Spans,
        num_documents: int,
        cached_lengths: Sequence[int] | None,
        cache_starts: Sequence[int] | None,
        cache_slots: int | None,
    ) -> "CacheSlots | None":
        """From the arguments of `from_spans`; None without a cache. Raises ValueError if they do not fit."""
        if cached_lengths is None and cache_starts is None and cache_slots is None:
            return None
        if cached_lengths is None or cache_starts is None or cache_slots is None:
            raise ValueError("give cached_lengths, cache_starts and cache_slots together, or none of them")
        if spans.modes is not None and (spans.modes & HIDDEN).any():
            raise ValueError(
                f"document {spans.documents[np.flatnonzero(spans.modes & HIDDEN)[0]]} has a hidden span, which later "
                "tokens would see in a key-value cache; leave out 'hidden' and write the next tokens over the span's "
                "slots, or leave out the cache"
            )
        cached, starts = np.asarray(cached_lengths, np.int64), np.asarray(cache_starts, np.int64)
        for name, vector in (("cached_lengths", cached), ("cache_starts", starts)):
            if vector.shape != (num_documents,):
                raise ValueError(f"{name} must have one entry for each of {num_documents} documents, got {vector.size}")
        if not 0 <= cache_slots <= MAX_TOKENS:
            raise ValueError(f"cache_slots must be from 0 to {MAX_TOKENS}, got {cache_slots}")
        if cached.min(initial=0) < 0:
            raise ValueError(
                f"cached_lengths must be at least 0, got {cached.min()} for document {int(cached.argmin())}"
            )
        ends = np.append(starts[1:], cache_slots)
        falls = np.flatnonzero(np.diff(starts, prepend=0) < 0)
        if falls.size:
            raise ValueError(
                f"cache_starts must ascend from 0, got {starts[falls[0]]} for document {falls[0]}; sort the documents "
                "by them"
            )
        totals = cached + spans.totals(num_documents)
        is_shared = starts == ends
        is_shared[-1:] = False
        too_long = np.flatnonzero((starts + totals > ends) & ~is_shared)
        if too_long.size:
            d = int(too_long[0])
            raise ValueError(
                f"document {d} would hold {totals[d]} tokens, but it has {max(ends[d] - starts[d], 0)} slots of the "
                f"cache, from {starts[d]} to {ends[d]}; give it more"
            )
        for d in np.flatnonzero(is_shared).tolist():
            pair = [np.flatnonzero(spans.documents == document) for document in (d, d + 1)]
            is_single = all(
                here.size == 1 and (spans.kinds[here[0]] == IMAGE or spans.lengths[here[0]] == 1) for here in pair
            )
            if not is_single or cached[d] != cached[d + 1] or totals[d] != totals[d + 1]:
                raise ValueError(
                    f"documents {d} and {d + 1} both begin at slot {starts[d]} of the cache; only documents of one "
                    "token or one image may, with equal lengths in the cache and in the batch"
                )
        return cls(cached.astype(np.int32), starts.astype(np.int32), int(cache_slots))
