"""Packs documents into sequences of fixed capacity so that little padding is left."""

from typing import Any

import numpy as np

from lmfusion_kernels.layout import build


def pack_documents(lengths: Any, capacity: int, window: int = 1024) -> list[np.ndarray]:
    """Pack documents of `lengths` tokens (integers [n]) into sequences of at most `capacity` tokens.

    Within each window of `window` consecutive documents there are as few sequences as best-fit decreasing needs. If the
    documents also fit into that number when each goes to the emptiest sequence, longest first, they are dealt out that
    way: the sequences are then about equally full, each with long and short documents. A sequence never reaches outside
    its window, so a stream can be packed window by window. Deterministic: equal input gives equal sequences on any
    machine.

    Returns one int64 array per sequence: the indices of its documents, ascending. Every document is in exactly one.

    Raises ValueError if a length is not positive, a document is longer than `capacity`, or `window` is below 1.
    """
    lengths = np.asarray(lengths)
    if lengths.size == 0:
        lengths = lengths.astype(np.int64)
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        raise ValueError(f"lengths must be integers [n], got {lengths.dtype} of shape {lengths.shape}")
    if window < 1:
        raise ValueError(f"window must be at least 1 document, got {window}")
    if lengths.size and lengths.min() <= 0:
        raise ValueError(f"lengths must be positive, got {int(lengths.min())} for document {int(lengths.argmin())}")
    if lengths.size and lengths.max() > capacity:
        raise ValueError(
            f"lengths must be at most the capacity of {capacity} tokens, got {int(lengths.max())} for document "
            f"{int(lengths.argmax())}; shorten it, leave it out, or raise the capacity"
        )
    return build.pack(np.ascontiguousarray(lengths, np.int64), capacity, window)
