"""Which documents share a row of fixed capacity, so that few slots stay empty?"""

from typing import Any

import numpy as np

from lmfusion_kernels.layout import build


def pack_documents(lengths: Any, capacity: int, window: int = 1024) -> list[np.ndarray]:
    """Pack documents of `lengths` tokens (integers [n]) into rows of at most `capacity` tokens.

    Within each window of `window` consecutive documents there are as few rows as best-fit decreasing needs. Where the
    documents also fit into so many rows when each goes to the emptiest, the longest first, they are dealt out so: then
    rows are about equally full, each with long and short documents. A row never reaches outside its window, and a
    stream can be packed window by window. Deterministic: equal input, equal rows, on any machine.

    Returns one int64 array a row: the indices of its documents, ascending. Every document is in exactly one row.

    Raises ValueError if a length is not positive, a document is longer than `capacity`, or `window` is below 1.
    """
    lengths = np.asarray(lengths)
    if lengths.size == 0:
        lengths = lengths.astype(np.int64)
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        raise ValueError(f"lengths must be integers [n]; got {lengths.dtype} of shape {lengths.shape}")
    if window < 1:
        raise ValueError(f"window={window}; it is a number of documents and at least 1")
    if lengths.size and lengths.min() <= 0:
        raise ValueError(f"document {int(lengths.argmin())} has length {int(lengths.min())}; lengths are positive")
    if lengths.size and lengths.max() > capacity:
        raise ValueError(
            f"document {int(lengths.argmax())} has {int(lengths.max())} tokens, but a row has room for {capacity}; "
            "shorten it, leave it out, or raise the capacity"
        )
    return build.pack(np.ascontiguousarray(lengths, np.int64), capacity, window)
