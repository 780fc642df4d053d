"""TokenLayout: which tower handles each token of a packed batch, and which keys it sees.

Index vectors, built once per batch on the host. Two orders of the same tokens (docs/design.md, "Two orders of tokens"):

* sequence order: documents one after another, spans as they occur. Attention works here.
* tower order: tokens grouped stably as [constant text | live text | image]. Everything else works here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lmfusion_kernels.layout import build
from lmfusion_kernels.layout.buffer import buffer_of, copy_together, pack, pack_arrays, padded
from lmfusion_kernels.layout.cache_slots import CacheSlots
from lmfusion_kernels.layout.masks import (
    BUILDER_NAMES,
    PIECES,
    CausalDocuments,
    HiddenSpans,
    LayoutCounts,
    TokenMask,
    TokenOrder,
    make_piece,
)
from lmfusion_kernels.layout.spans import FULL, HIDDEN, IMAGE, MARKER, SPANS_EXPECTED, TEXT, Document, Spans
from lmfusion_kernels.ops.reorder_rows import reorder_rows
from lmfusion_kernels.runtime.pytrees import register_tree

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes that ops compute with. The backend decides which of them its kernels take; the reference takes all."""


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Routing and mask of a packed batch of N tokens.

    Every vector is int32 and lies on one device; every count is an int on the host, so no op that uses a layout has to
    wait for the device. Query `i` sees the keys `[key_start[i], key_end[i])`, except keys of other hidden spans; both
    vectors are non-decreasing in sequence order.

    *Hidden* spans are seen only from within: no token behind a hidden span sees its keys. Its own tokens see what any
    token in their place would see, and their span (BAGEL's noised copies of images, arXiv 2505.14683).

    Token classes: *constant* tokens are text before the first image or marker of their document when the text tower is
    frozen; nothing trainable reaches them, so they have no backward. *live* tokens are the other text tokens and the
    markers (BOI, EOI: text-tower tokens whose embedding is trained). *image* tokens belong to the image tower. *active*
    tokens are the live and the image tokens.

    Build one with `from_spans` or `from_modality_ids`.
    """

    counts: LayoutCounts
    order: TokenOrder
    mask: TokenMask
    """All tokens as queries."""
    active: TokenMask
    """The active tokens as queries. Without constant tokens these are the vectors of `mask`."""
    constant: TokenMask
    """The constant tokens as queries."""
    causal: CausalDocuments
    hidden: HiddenSpans

    _buffer: ClassVar[Tensor | None] = None
    _numbers: ClassVar[Tensor | None] = None

    def __post_init__(self) -> None:
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "_buffer", buffer_of(self.vectors))
            object.__setattr__(self, "_numbers", numbers_of(self))

    def as_two_tensors(self) -> tuple[Tensor, Tensor]:
        """All vectors in one buffer, and `numbers_of` the layout: the arguments of an op that stands for a whole block.

        So a graph depends on no count and on no vector's size. A count or size that is 0 or 1 would otherwise need a
        graph of its own.
        """
        buffer = pack(self.vectors) if self._buffer is None else self._buffer
        return buffer, numbers_of(self) if self._numbers is None else self._numbers

    @property
    def num_tokens(self) -> int:
        return self.counts.num_tokens

    @property
    def num_text(self) -> int:
        """Tokens of the text tower: constant and live."""
        return self.counts.num_text

    @property
    def num_live(self) -> int:
        return self.counts.num_live

    @property
    def num_image(self) -> int:
        return self.counts.num_tokens - self.counts.num_text

    @property
    def num_constant(self) -> int:
        return self.counts.num_text - self.counts.num_live

    @property
    def num_active(self) -> int:
        return self.num_tokens - self.num_constant

    @property
    def num_keys(self) -> int:
        """Rows of the key buffer: num_tokens, or the slots of the key-value cache if there is one."""
        return self.counts.num_keys

    @property
    def num_documents(self) -> int:
        return self.counts.num_documents

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document, including those in the cache."""
        return self.counts.longest_document

    @property
    def is_cached(self) -> bool:
        """Whether keys live in a cache that also holds earlier tokens. Such a layout has no backward."""
        return self.counts.is_cached

    @property
    def has_hidden(self) -> bool:
        """Whether some span is hidden."""
        return self.mask.visible_end.shape[0] > 0

    @property
    def tower_to_sequence(self) -> Tensor:
        """[N] sequence index of each token in tower order."""
        return self.order.tower_to_sequence

    @property
    def sequence_to_tower(self) -> Tensor:
        """[N] tower index of each token in sequence order."""
        return self.order.sequence_to_tower

    @property
    def position(self) -> Tensor:
        """[N] RoPE position in sequence order: one running count per document."""
        return self.order.position

    @property
    def key_start(self) -> Tensor:
        """[N] first key that each query sees, in sequence order."""
        return self.mask.key_start

    @property
    def key_end(self) -> Tensor:
        """[N] end of the keys that each query sees, in sequence order."""
        return self.mask.key_end

    @property
    def device(self) -> torch.device:
        return self.position.device

    @classmethod
    def from_spans(
        cls,
        documents: Iterable[Document],
        *,
        frozen_text: bool = True,
        device: torch.device | str | None = None,
        cached_lengths: Sequence[int] | None = None,
        cache_starts: Sequence[int] | None = None,
        cache_slots: int | None = None,
    ) -> "TokenLayout":
        """Lay out documents given as lists (any iterables) of (modality, length), as `[[("text", 3), ("image", 256)]]`.

        Modalities are "text", "image" and "marker" (text-tower tokens whose embedding is trained: BOI, EOI). Lengths
        are positive token counts. An empty list of documents gives an empty layout.

        `(modality, length, "hidden")` is a span that no token outside it sees; any modality may be hidden, and text
        stays causal inside. `("full", [(modality, length), ...])` joins spans of one document to a segment whose tokens
        all see each other, whatever their towers: `("full", [("marker", 1), ("image", 256), ("marker", 1)])`. Its text
        tokens count as live. `("full", [...], "hidden")` is hidden as a whole.

        With a key-value cache of `cache_slots` slots, document `d` already has `cached_lengths[d]` tokens in it, from
        slot `cache_starts[d]` on, and the given spans continue it. A document owns the slots up to the next document's
        start, or to the end of the cache. Slots that no document fills belong to others and are not touched. Starts
        ascend. Documents of one token or one image, alike in both lengths, may have the same start: they overwrite each
        other's slots, so their results are worthless. They pad a batch to a size for which a CUDA graph exists.

        Raises ValueError for other kinds of spans, an unknown modality, a length that is not a positive integer, a
        document without spans, a document that does not fit into its slots, or hidden spans with a cache.
        """
        try:
            batch = [list(document) for document in documents]
        except TypeError as error:
            raise ValueError(f"{error}; {SPANS_EXPECTED}") from error
        spans = Spans.of(batch)
        num_documents = len(batch)
        cache = CacheSlots.from_arguments(spans, num_documents, cached_lengths, cache_starts, cache_slots)
        return cls._build(spans, num_documents, frozen_text, device, cache)

    @classmethod
    def from_modality_ids(
        cls,
        modality_ids: Any,
        document_ids: Any,
        image_ids: Any,
        *,
        hidden_ids: Any = None,
        frozen_text: bool = True,
        device: torch.device | str | None = None,
    ) -> "TokenLayout":
        """Lay out N tokens given one id each, in sequence order.

        modality_ids [N]: 0 text, 1 image, 2 marker. document_ids [N]: non-decreasing. image_ids [N]: the same number
        for all tokens of an image, another for the next image; ignored at text tokens. hidden_ids [N]: the same number
        from 0 on for all tokens of a hidden span, another for the next one; -1 at tokens that are not hidden. Tensors
        on a device are copied to the host, which waits for the device; `from_spans` does not.

        Raises ValueError when shapes differ, a modality is unknown, document ids decrease, or a hidden span is not of
        one modality and one image (`from_spans` takes such spans, as "full").
        """
        modality, document, image = (_ids(ids) for ids in (modality_ids, document_ids, image_ids))
        if not modality.shape == document.shape == image.shape:
            raise ValueError(
                "modality_ids, document_ids and image_ids must have one entry per token, "
                f"got {modality.size}, {document.size} and {image.size} entries"
            )
        unknown = modality[(modality < TEXT) | (modality > MARKER)]
        if unknown.size:
            raise ValueError(f"modality_ids must be 0 (text), 1 (image) or 2 (marker), got {unknown[0]}")
        if (np.diff(document) < 0).any():
            raise ValueError("document_ids must not decrease; put the tokens of a document next to each other")
        hidden = np.full(modality.size, -1) if hidden_ids is None else np.maximum(_ids(hidden_ids), -1)
        if hidden.shape != modality.shape:
            raise ValueError(f"hidden_ids must have one entry per token, {modality.size}, got {hidden.size}")
        image = np.where(modality == IMAGE, image, -1)
        changes = (np.diff(modality) != 0) | (np.diff(document) != 0) | (np.diff(image) != 0)
        split = np.flatnonzero(changes & (np.diff(hidden) == 0) & (hidden[1:] >= 0))
        if split.size:
            raise ValueError(
                f"hidden_ids has {hidden[split[0]]} on both sides of token {split[0] + 1}, where another span begins; "
                "give each hidden span a number of its own, or join spans: from_spans([[('full', [...], 'hidden')]])"
            )
        is_first = np.append(np.ones(min(modality.size, 1), bool), changes | (np.diff(hidden) != 0))
        starts = np.flatnonzero(is_first)
        _, span_documents = np.unique(document[starts], return_inverse=True)
        kinds, is_hidden = modality[starts].astype(np.uint8), hidden[starts] >= 0
        spans = Spans(kinds, np.diff(np.append(starts, modality.size)), span_documents.astype(np.int32))
        if is_hidden.any():
            modes = (FULL * (kinds == IMAGE) + HIDDEN * is_hidden).astype(np.uint8)
            spans = replace(spans, segments=np.arange(kinds.size, dtype=np.int32), modes=modes)
        return cls._build(spans, int(span_documents.max(initial=-1)) + 1, frozen_text, device)

    @classmethod
    def _build(
        cls,
        spans: Spans,
        num_documents: int,
        frozen_text: bool,
        device: torch.device | str | None,
        cache: CacheSlots | None = None,
    ) -> "TokenLayout":
        totals = spans.totals(num_documents)  # tokens of each document
        arguments = spans.kinds, spans.lengths, spans.documents, frozen_text
        if cache is None:
            vectors, counts = build.build_layout(*arguments, segments=spans.segments, modes=spans.modes)
        else:
            totals += cache.lengths
            place = cache.lengths, cache.starts, cache.num_slots
            vectors, counts = build.build_layout(*arguments, *place, segments=spans.segments, modes=spans.modes)
        num_tokens = counts["num_tokens"]
        layout_counts = LayoutCounts(
            num_tokens=num_tokens,
            num_text=counts["num_text"],
            num_live=counts["num_text"] - counts["num_constant"],
            num_keys=num_tokens if cache is None else cache.num_slots,
            num_documents=num_documents,
            longest_document=int(totals.max(initial=0)),
            longest_active=counts["longest_active"],
            longest_triangle=counts["longest_triangle"],
            is_cached=cache is not None,
        )
        tensors = pack_arrays({name: vectors[builder_name] for name, builder_name in BUILDER_NAMES.items()})
        layout = cls(layout_counts, **pieces_of(tensors))
        return layout if device is None else layout.to(device)

    def to(self, device: torch.device | str) -> "TokenLayout":
        """The same layout with its vectors on `device`: one copy for all of them, without waiting for it."""
        if torch.device(device) == self.device:
            return self
        return self.with_vectors(copy_together(self.vectors, device))

    @property
    def vectors(self) -> dict[str, Tensor]:
        """All vectors by name, as "active_key_start". What else a layout holds is `counts`."""
        return {f"{piece}_{name}": getattr(getattr(self, piece), name) for piece in PIECES for name in PIECES[piece][1]}

    def with_vectors(self, vectors: dict[str, Tensor]) -> "TokenLayout":
        """The same layout with these vectors, by name, in place of its own."""
        return replace(self, **pieces_of(vectors))

    def bounded(self, most: int | None = None) -> "TokenLayout":
        """The same layout with longest_document rounded up to a power of two, or to `most` if that is less.

        Ops need only an upper bound of it, so what is captured for one bounded layout serves for many.
        """
        bound = 1 << max(self.longest_document - 1, 0).bit_length()
        longest = bound if most is None else max(self.longest_document, min(bound, most))
        return replace(self, counts=replace(self.counts, longest_document=longest))

    def mask_of(self, queries: str) -> TokenMask:
        """`mask` for "all", `active` for "active", `constant` for "constant"."""
        if queries == "all":
            return self.mask
        return self.active if queries == "active" else self.constant

    def to_tower_order(self, x: Tensor) -> Tensor:
        """Rows [N, ...] of any dtype from sequence order to tower order."""
        self._check_rows_and_device(x, self.num_tokens, "x")
        return reorder_rows(x, self.tower_to_sequence, self.sequence_to_tower)

    def to_sequence_order(self, x: Tensor) -> Tensor:
        """Rows [N, ...] of any dtype from tower order to sequence order."""
        self._check_rows_and_device(x, self.num_tokens, "x")
        return reorder_rows(x, self.sequence_to_tower, self.tower_to_sequence)

    def check_rows(self, x: Tensor, num_rows: int | None = None, name: str = "x") -> None:
        """Raise ValueError unless `x` has `num_rows` rows (default: one per token), a dtype of `ROW_DTYPES` and this
        layout's device."""
        self._check_rows_and_device(x, self.num_tokens if num_rows is None else num_rows, name)
        if x.dtype not in ROW_DTYPES:
            taken = ", ".join(str(dtype).removeprefix("torch.") for dtype in ROW_DTYPES)
            raise ValueError(
                f"{name} must be in one of {taken}, got {x.dtype}; cast it, as with {name}.to(torch.float32)"
            )

    def _check_rows_and_device(self, x: Tensor, num_rows: int, name: str) -> None:
        if x.dim() == 0 or x.shape[0] != num_rows:
            raise ValueError(f"{name} must have {num_rows} rows for this layout, got shape {tuple(x.shape)}")
        if x.device != self.device:
            raise ValueError(
                f"{name} must be on the layout's device {self.device}, got {x.device}; build the layout with "
                f"device={str(x.device)!r}"
            )


def _ids(ids: Any) -> np.ndarray:
    return np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids).astype(np.int64).reshape(-1)


COUNTS = tuple(field.name for field in fields(LayoutCounts))


def pieces_of(vectors: dict[str, Any]) -> dict[str, Any]:
    """The pieces of a layout, by name, from all its vectors."""
    return {piece: make_piece(piece, vectors.__getitem__) for piece in PIECES}


def numbers_of(layout: TokenLayout) -> Tensor:
    """The counts of a layout and the sizes of its vectors, int32 on the host."""
    counts = [getattr(layout.counts, name) for name in COUNTS]
    sizes = [vector.shape[0] for vector in layout.vectors.values()]
    return torch.tensor([*counts, *sizes], dtype=torch.int32, device="cpu")


class BufferedLayout(TokenLayout):
    """The layout that `TokenLayout.as_two_tensors` took apart. A piece is cut out of the buffer when it is first used.

    An op that stands for a block builds one in every call, and needs few of the vectors.
    """

    def __init__(self, buffer: Tensor, numbers: Tensor) -> None:
        values = numbers.tolist()
        counts = dict(zip(COUNTS, values, strict=False))
        slices, offset = {}, 0
        for name, size in zip(BUILDER_NAMES, values[len(COUNTS) :], strict=True):
            slices[name] = slice(offset, offset + size)
            offset += padded(size)
        vars(self).update(
            counts=LayoutCounts(**counts | {"is_cached": bool(counts["is_cached"])}),
            _buffer=buffer,
            _numbers=numbers,
            _slices=slices,
        )

    def __getattr__(self, name: str) -> Any:
        if name not in PIECES:
            raise AttributeError(name)
        buffer, slices = vars(self)["_buffer"], vars(self)["_slices"]
        piece = make_piece(name, lambda vector: buffer[slices[vector]])
        vars(self)[name] = piece
        return piece


def _to_dict(layout: TokenLayout) -> dict[str, Any]:
    counts = {name: getattr(layout.counts, name) for name in COUNTS}
    buffer, numbers = layout.as_two_tensors()
    return {**counts, **layout.vectors, "_buffer": buffer, "_numbers": numbers}


def _from_dict(values: dict[str, Any]) -> TokenLayout:
    """The values may be anything: tensors that are traced, or what some function made of each."""
    layout, numbers = object.__new__(TokenLayout), values["_numbers"]
    counts = LayoutCounts(**{name: values[name] for name in COUNTS})
    vars(layout).update(counts=counts, **pieces_of(values), _buffer=values["_buffer"], _numbers=numbers)
    if isinstance(numbers, Tensor) and numbers.device.type != "cpu":  # moved with the vectors
        vars(layout)["_numbers"] = numbers_of(layout)
    return layout


register_tree(TokenLayout, "lmfusion_kernels.TokenLayout", _to_dict, _from_dict)
