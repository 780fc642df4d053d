"""How are tokens that were read once not read again? Keys and values of every layer, a range of rows a document."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmfusion_kernels.layout import token_layout as layouts
from lmfusion_kernels.layout.token_layout import TokenLayout

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

ALIGNMENT = 64
"""Ranges begin at multiples of it, where attention on a CPU begins a tile of keys: it adds up a document's numbers in
one order wherever the document lies."""


@dataclass(eq=False)
class CachedDocument:
    """A range of rows of the cache, and how many of them hold tokens.

    Whatever continues the document is written behind them. Until `length` is advanced the next one writes the same
    rows again, which is how every denoising step replaces the image of the step before.
    """

    start: int
    num_rows: int
    length: int = 0


class KeyValueCache:
    """Keys and values of up to `num_rows` tokens, allocated once.

    Documents get contiguous ranges of rows and give them back. `num_scratch` rows more lie behind them, for documents
    that only fill up a batch of fixed size.
    """

    layers: list[tuple[Tensor, Tensor]]
    """(k, v) of each layer, [num_rows + num_scratch, H_kv, D]"""

    def __init__(self, model: "LMFusion", num_rows: int, num_scratch: int = 0) -> None:
        text_config = model.config.text_config
        like = model.embed(torch.empty(0, dtype=torch.int64, device=model.device))  # dtype and device that rows have
        shape = (num_rows + num_scratch, text_config.num_key_value_heads, model.config.head_dim)
        # Zeros, not garbage: a masked key has weight 0, and 0 times NaN would be NaN
        self._buffer = like.new_zeros(text_config.num_hidden_layers, 2, *shape)
        self.layers = [(keys, values) for keys, values in self._buffer]
        self.num_rows = num_rows
        self.scratch = CachedDocument(num_rows, num_scratch)
        self._free = [(0, num_rows)]  # ranges (start, end), ascending, no two of them adjacent

    @property
    def num_rows_used(self) -> int:
        return self.num_rows - sum(end - start for start, end in self._free)

    @property
    def device(self) -> torch.device:
        return self._buffer.device

    def allocate(self, sizes: Sequence[int]) -> list[CachedDocument] | None:
        """A document of each of `sizes` rows, or None, and nothing taken, where they do not all fit now.

        Sizes are multiples of ALIGNMENT.
        """
        before = list(self._free)
        documents: list[CachedDocument] = []
        for size in sizes:
            i = next((i for i, (start, end) in enumerate(self._free) if end - start >= size), None)
            if i is None:
                self._free = before
                return None
            start, end = self._free[i]
            self._free[i : i + 1] = [(start + size, end)] if start + size < end else []
            documents.append(CachedDocument(start, size))
        for document in documents:
            # The last owner's numbers may not be finite
            self._buffer[:, :, document.start : document.start + document.num_rows].zero_()
        return documents

    def free(self, documents: Sequence[CachedDocument]) -> None:
        """Take back the rows of `documents`, which are not to be used any more."""
        ranges = sorted(
            [*self._free, *((document.start, document.start + document.num_rows) for document in documents)]
        )
        self._free = []
        for start, end in ranges:
            if self._free and self._free[-1][1] == start:
                start = self._free.pop()[0]
            self._free.append((start, end))

    def layout(self, documents: Sequence[CachedDocument], continuations: Sequence[layouts.Document]) -> TokenLayout:
        """The layout of tokens that continue `documents`, in ascending order of their ranges."""
        return TokenLayout.from_spans(
            continuations,
            device=self.device,
            cached_lengths=[document.length for document in documents],
            cache_starts=[document.start for document in documents],
            cache_slots=self.num_rows + self.scratch.num_rows,
        )
