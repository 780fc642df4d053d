"""The key-value cache: keys and values of every layer, and a contiguous range of slots for each document."""

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
"""Ranges start at multiples of this, where attention on the CPU starts a tile of keys. So the sums over a document's
keys are taken in the same order wherever the document lies in the cache."""


@dataclass(eq=False)
class CachedDocument:
    """A range of slots of the cache, and how many of them hold tokens.

    New tokens are written behind the first `length` slots. Until `length` is advanced, the next forward writes the same
    slots again: this is how each denoising step replaces the noisy image of the step before.
    """

    start: int
    num_slots: int
    length: int = 0


class KeyValueCache:
    """Keys and values of up to `num_slots` tokens, allocated once.

    Documents get contiguous ranges of slots and give them back. `num_scratch` more slots lie behind these, for the
    documents that pad a batch to a fixed size.
    """

    layers: list[tuple[Tensor, Tensor]]
    """(k, v) of each layer, [num_slots + num_scratch, H_kv, D]"""

    def __init__(self, model: "LMFusion", num_slots: int, num_scratch: int = 0) -> None:
        text_config = model.config.text_config
        like = model.embed(
            torch.empty(0, dtype=torch.int64, device=model.device)
        )  # has the dtype and device of embeddings
        shape = (num_slots + num_scratch, text_config.num_key_value_heads, model.config.head_dim)
        # Zeros, not garbage: a masked key has weight 0, and 0 times NaN would be NaN
        self._buffer = like.new_zeros(text_config.num_hidden_layers, 2, *shape)
        self.layers = [(keys, values) for keys, values in self._buffer]
        self.num_slots = num_slots
        self.scratch = CachedDocument(num_slots, num_scratch)
        self._free = [(0, num_slots)]  # ranges (start, end), ascending, no two of them adjacent

    @property
    def num_slots_used(self) -> int:
        return self.num_slots - sum(end - start for start, end in self._free)

    @property
    def device(self) -> torch.device:
        return self._buffer.device

    def allocate(self, sizes: Sequence[int]) -> list[CachedDocument] | None:
        """An empty document with each of `sizes` slots. None, with nothing allocated, if they do not all fit now.

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
            # The last owner may have left NaN there, and a masked key's weight of 0 times NaN is NaN. Forwards of the
            # last owner that are still queued on the device come first, as this runs on the same stream.
            self._buffer[:, :, document.start : document.start + document.num_slots].zero_()
        return documents

    def free(self, documents: Sequence[CachedDocument]) -> None:
        """Take back the slots of `documents`, which must not be used again."""
        ranges = sorted(
            [*self._free, *((document.start, document.start + document.num_slots) for document in documents)]
        )
        self._free = []
        for start, end in ranges:
            if self._free and self._free[-1][1] == start:
                start = self._free.pop()[0]
            self._free.append((start, end))

    def layout(self, documents: Sequence[CachedDocument], continuations: Sequence[layouts.Document]) -> TokenLayout:
        """The layout of new tokens that continue `documents`.

        documents: in ascending order of their ranges, as attention requires.
        """
        return TokenLayout.from_spans(
            continuations,
            device=self.device,
            cached_lengths=[document.length for document in documents],
            cache_starts=[document.start for document in documents],
            cache_slots=self.num_slots + self.scratch.num_slots,
        )
