"""Which tower handles a token, and which keys does it see? Index vectors for one packed batch, built once on the host.

Two orders of the same rows (docs/design.md, section 2):

* sequence order: documents one after another, spans as they occur. Attention works here.
* tower order: rows grouped stably as [constant text | live text | image]. Everything else works here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lmfusion_kernels.layout import build
from lmfusion_kernels.layout.buffer import buffer_of, copy_together, pack, pack_arrays, padded
from lmfusion_kernels.layout.cache_slots import CachePlace
from lmfusion_kernels.layout.spans import FULL, HIDDEN, IMAGE, MARKER, SPANS_EXPECTED, TEXT, Document, Spans
from lmfusion_kernels.ops.reorder_rows import reorder_rows
from lmfusion_kernels.runtime.pytrees import register_tree

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What ops compute with; which of it the kernels take is the backend's matter, the reference takes all."""


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Routing and mask of a packed batch of N tokens.

    Every vector is int32 and lies on one device; every count is an int on the host, so no op that uses a layout has to
    wait for the device. Query `i` sees the keys `[key_start[i], key_end[i])` but those of hidden spans other than its
    own; key `j` is seen by the queries `[query_start[j], query_end[j])`. All four are non-decreasing in sequence order,
    but for query_end where spans are hidden.

    *Hidden* spans are seen from within alone: a key of one ends for all queries behind its span. Its own rows see what
    every row in their place sees, themselves included (BAGEL's noised copies of images, arXiv 2505.14683).

    Row classes: *constant* rows are text rows before the first image or marker of their document when the text tower is
    frozen; nothing trainable reaches them, so they have no backward. *live* rows are the other text rows and the
    markers (BOI, EOI: text-tower rows whose embedding is trained). *image* rows belong to the image tower.

    Build one with `from_spans` or `from_modality_ids`.
    """

    num_tokens: int
    num_text: int
    """Rows of the text tower: constant and live."""
    num_live: int
    """Text rows that are not constant. Stored in place of num_constant, which often equals num_text: torch.compile
    takes equal numbers for one and loses track of it in stacked blocks."""
    num_keys: int
    """Rows of the key buffer: num_tokens, or those of the key-value cache where one is used."""
    num_documents: int
    longest_document: int
    """Tokens of the longest document, those in the cache included. Ops take it for an upper bound: see `bounded`."""
    longest_active: int
    """Active rows of the document that has most of them; with a cache, its new tokens."""
    longest_triangle: int
    """Rows of the longest triangle (see `triangle_row`)."""
    is_cached: bool
    """Whether keys live in a cache that holds earlier tokens too. Such a layout has no backward."""

    tower_to_sequence: Tensor
    """[N] sequence index of each row in tower order."""
    sequence_to_tower: Tensor
    """[N] tower index of each row in sequence order."""
    position: Tensor
    """[N] RoPE position in sequence order: one running count per document."""
    key_start: Tensor
    key_end: Tensor
    query_start: Tensor
    query_end: Tensor
    key_slot: Tensor
    """[N] row of the key buffer that holds the key of each token, in sequence order (the identity without a cache)."""

    # The same mask for the rows that take part in a backward ("active": all but the constant ones). An active row's
    # rank is its place among the active rows in sequence order. Without constant rows these are the vectors above.
    query_row: Tensor
    """[N] by tower row: a constant row's own index, or num_constant + rank of an active one."""
    constant_key_start: Tensor
    constant_key_end: Tensor
    active_key_start: Tensor
    """[num_active] first key seen by the active query of this rank."""
    active_key_end: Tensor
    active_key: Tensor
    """[num_active] sequence index of the active row of this rank."""
    active_query_start: Tensor
    """[num_active] first rank among the active queries that see this active key."""
    active_query_end: Tensor
    active_row: Tensor
    """[num_active] by rank: row in [live | image] order, that is tower index minus num_constant."""

    # What hidden spans add, by key; all empty where nothing is hidden. Of its range, a query sees the keys with
    # query < visible_end[key]: the end of the key's segment if that is hidden, otherwise the end of its document.
    visible_end: Tensor
    """[N] or empty: the first query from which on a key is unseen, by sequence index of both."""
    constant_visible_end: Tensor
    """[N] or empty: the same counted in constant rows, as queries that are constant rows are."""
    active_visible_end: Tensor
    """[N] or empty: the same counted in active rows (ranks)."""
    run_end: Tensor
    """[N] or empty: where the stretch of keys that a key belongs to ends; keys of a stretch have one visible_end. A
    stretch is a hidden segment, or what lies between such, within a document."""

    # The mask as kernels for packed causal attention know it: causal documents, and for each image the triangle that
    # causality leaves out. An image's rows but the last, in reverse, see its rows but the first, in reverse, causally.
    document_start: Tensor
    """[num_documents + 1] first token of each document, then num_tokens."""
    document_key_start: Tensor
    """[num_documents + 1] row of the key buffer where each document begins, then num_keys. In a cache a document need
    not reach to the next one's start: document_num_keys says how far it goes."""
    document_num_keys: Tensor
    """[num_documents] tokens of each document, those in the cache included."""
    active_document_start: Tensor
    """[num_documents + 1] rank of the first active row of each document, then num_active."""
    triangle_start: Tensor
    """[number of images with two tokens or more + 1] where in triangle_row each of them begins, then its size."""
    triangle_row: Tensor
    """Sequence indices of the rows of all images but the last of each: every image in reverse. The key that the first
    query of an image sees beyond itself, and so on down, is that of the next row, triangle_row + 1."""
    active_triangle_row: Tensor
    """The same rows by their rank."""

    # With hidden spans the causal documents become P *parts*, each causal attention whose last query sees the last key:
    # the visible rows of each document, then each of its hidden segments, whose keys are the visible rows before it and
    # its own. All empty where nothing is hidden.
    part_start: Tensor
    """[P + 1] where in part_row each part begins, then num_tokens."""
    part_row: Tensor
    """[N] sequence indices of the queries, part by part."""
    part_key_start: Tensor
    """[P + 1] where in part_key each part begins, then its size."""
    part_key: Tensor
    """Sequence indices of the keys, part by part; visible keys before hidden segments occur again for each of them."""
    active_part_start: Tensor
    """[P + 1] as part_start, counting active rows alone."""
    active_part_row: Tensor
    """[num_active] the active queries by rank, part by part."""
    constant_part_row: Tensor
    """[num_constant] the constant queries by their number among the constant rows, part by part."""
    constant_part_num_keys: Tensor
    """[P] how many of a part's keys its constant queries need: the first ones."""

    _buffer: ClassVar[Tensor | None] = None
    _numbers: ClassVar[Tensor | None] = None

    def __post_init__(self) -> None:
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "_buffer", buffer_of(self.vectors))
            object.__setattr__(self, "_numbers", numbers_of(self))

    def as_two_tensors(self) -> tuple[Tensor, Tensor]:
        """All vectors in one buffer, and `numbers_of` the layout: what an op takes that stands for a whole block.

        So a graph depends on no count and on the size of no vector, of which those that are 0 or 1 would each need a
        graph of their own.
        """
        buffer = pack(self.vectors) if self._buffer is None else self._buffer
        return buffer, numbers_of(self) if self._numbers is None else self._numbers

    @property
    def num_image(self) -> int:
        return self.num_tokens - self.num_text

    @property
    def num_constant(self) -> int:
        return self.num_text - self.num_live

    @property
    def num_active(self) -> int:
        return self.num_tokens - self.num_constant

    @property
    def has_hidden(self) -> bool:
        """Whether some span is hidden."""
        return self.visible_end.shape[0] > 0

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

        `(modality, length, "hidden")` is a span that no row outside it sees; any modality may be hidden, and text stays
        causal inside. `("full", [(modality, length), ...])` joins spans of one document to a segment whose rows all see
        each other, whatever their towers: `("full", [("marker", 1), ("image", 256), ("marker", 1)])`. Its text rows
        count as live. `("full", [...], "hidden")` is hidden as a whole.

        With a key-value cache of `cache_slots` rows, document `d` already has `cached_lengths[d]` tokens in it, from row
        `cache_starts[d]` on, and the given spans continue it. Documents own the rows up to the next one's start, or to
        the end; rows that none of them fills, between them or behind the last, belong to others and are not touched.
        Starts ascend. Documents of one token or one image, alike in both lengths, may have the same start: they write
        the same rows, so what they become is worthless. They fill a batch up to a size that a CUDA graph knows.

        Raises ValueError for spans that are none of these, an unknown modality, a length that is not a positive
        integer, a document without spans, one that does not fit into its rows of the cache, or hidden spans with a
        cache.
        """
        try:
            batch = [list(document) for document in documents]
        except TypeError as error:
            raise ValueError(f"{error}; {SPANS_EXPECTED}") from error
        spans = Spans.of(batch)
        num_documents = len(batch)
        cache = CachePlace.checked(spans, num_documents, cached_lengths, cache_starts, cache_slots)
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
        one modality and one image (`from_spans` takes such, as "full").
        """
        modality, document, image = (_ids(ids) for ids in (modality_ids, document_ids, image_ids))
        if not modality.shape == document.shape == image.shape:
            raise ValueError(
                "modality_ids, document_ids and image_ids must have one entry a token; "
                f"they have {modality.size}, {document.size} and {image.size}"
            )
        unknown = modality[(modality < TEXT) | (modality > MARKER)]
        if unknown.size:
            raise ValueError(f"unknown modality id {unknown[0]}; known: 0 (text), 1 (image), 2 (marker)")
        if (np.diff(document) < 0).any():
            raise ValueError("document_ids must not decrease; pack the tokens of a document next to each other")
        hidden = np.full(modality.size, -1) if hidden_ids is None else np.maximum(_ids(hidden_ids), -1)
        if hidden.shape != modality.shape:
            raise ValueError(f"hidden_ids must have one entry a token, {modality.size}; it has {hidden.size}")
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
        cache: CachePlace | None = None,
    ) -> "TokenLayout":
        totals = spans.totals(num_documents)  # tokens of each document
        arguments = spans.kinds, spans.lengths, spans.documents, frozen_text
        if cache is None:
            vectors, counts = build.build_layout(*arguments, segments=spans.segments, modes=spans.modes)
        else:
            totals += cache.lengths
            place = cache.lengths, cache.starts, cache.num_rows
            vectors, counts = build.build_layout(*arguments, *place, segments=spans.segments, modes=spans.modes)
        num_tokens = counts["num_tokens"]
        tensors = pack_arrays({name: vectors[name] for name in VECTORS})
        layout = cls(
            num_tokens=num_tokens,
            num_text=counts["num_text"],
            num_live=counts["num_text"] - counts["num_constant"],
            num_keys=num_tokens if cache is None else cache.num_rows,
            num_documents=num_documents,
            longest_document=int(totals.max(initial=0)),
            longest_active=counts["longest_active"],
            longest_triangle=counts["longest_triangle"],
            is_cached=cache is not None,
            **tensors,
        )
        return layout if device is None else layout.to(device)

    def to(self, device: torch.device | str) -> "TokenLayout":
        """The same layout with its vectors on `device`: one copy for all of them, without waiting for it."""
        if torch.device(device) == self.device:
            return self
        return self.with_vectors(copy_together(self.vectors, device))

    @property
    def vectors(self) -> dict[str, Tensor]:
        """The vectors by name. The other fields, all of them counts, are `counts`."""
        return {name: getattr(self, name) for name in VECTORS}

    @property
    def counts(self) -> dict[str, int]:
        """The counts by name."""
        return {name: getattr(self, name) for name in COUNTS}

    def with_vectors(self, vectors: dict[str, Tensor]) -> "TokenLayout":
        """The same layout with these vectors, by name, in the place of its own."""
        changes: dict[str, Any] = {**vectors}
        return replace(self, **changes)

    def bounded(self, most: int | None = None) -> "TokenLayout":
        """The same layout with longest_document, of which ops need no more than an upper bound, rounded up to a power
        of two, or to `most` where that is less: what is captured for the one serves for many."""
        bound = 1 << max(self.longest_document - 1, 0).bit_length()
        return replace(self, longest_document=bound if most is None else max(self.longest_document, min(bound, most)))

    def to_tower_order(self, x: Tensor) -> Tensor:
        """Rows [N, ...] of any dtype from sequence order to tower order."""
        self._check_place(x, self.num_tokens, "x")
        return reorder_rows(x, self.tower_to_sequence, self.sequence_to_tower)

    def to_sequence_order(self, x: Tensor) -> Tensor:
        """Rows [N, ...] of any dtype from tower order to sequence order."""
        self._check_place(x, self.num_tokens, "x")
        return reorder_rows(x, self.sequence_to_tower, self.tower_to_sequence)

    def check_rows(self, x: Tensor, num_rows: int | None = None, name: str = "x") -> None:
        """Raise ValueError unless `x` has `num_rows` rows (default: one a token) of floating-point numbers that ops can
        compute with, on this layout's device."""
        self._check_place(x, self.num_tokens if num_rows is None else num_rows, name)
        if x.dtype not in ROW_DTYPES:
            taken = ", ".join(str(dtype).removeprefix("torch.") for dtype in ROW_DTYPES)
            raise ValueError(
                f"{name} is {x.dtype}; ops take rows in {taken}, so cast it, as with {name}.to(torch.float32)"
            )

    def _check_place(self, x: Tensor, num_rows: int, name: str) -> None:
        if x.dim() == 0 or x.shape[0] != num_rows:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, but the layout needs {num_rows} rows")
        if x.device != self.device:
            raise ValueError(
                f"{name} is on {x.device}, the layout on {self.device}; build it with device={str(x.device)!r}"
            )


def _ids(ids: Any) -> np.ndarray:
    return np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids).astype(np.int64).reshape(-1)


VECTORS = tuple(field.name for field in fields(TokenLayout) if field.type is Tensor)
COUNTS = tuple(field.name for field in fields(TokenLayout) if field.type is not Tensor)


def numbers_of(layout: TokenLayout) -> Tensor:
    """The counts of a layout and the sizes of its vectors, int32 on the host."""
    sizes = [vector.shape[0] for vector in layout.vectors.values()]
    return torch.tensor([*layout.counts.values(), *sizes], dtype=torch.int32, device="cpu")


class BufferedLayout(TokenLayout):
    """The layout that `TokenLayout.as_two_tensors` took apart. Its vectors are cut out of the buffer when asked for."""

    def __init__(self, buffer: Tensor, numbers: Tensor) -> None:
        values = numbers.tolist()
        counts = dict(zip(COUNTS, values, strict=False))
        parts, offset = {}, 0
        for name, size in zip(VECTORS, values[len(COUNTS) :], strict=True):
            parts[name] = (offset, size)
            offset += padded(size)
        vars(self).update(counts, is_cached=bool(counts["is_cached"]), _buffer=buffer, _numbers=numbers, _parts=parts)

    def __getattr__(self, name: str) -> Tensor:
        parts = vars(self)["_parts"]
        if name not in parts:
            raise AttributeError(name)
        offset, size = parts[name]
        vector: Tensor = vars(self)["_buffer"][offset : offset + size]
        vars(self)[name] = vector
        return vector


def _to_dict(layout: TokenLayout) -> dict[str, Any]:
    buffer, numbers = layout.as_two_tensors()
    return {**layout.counts, **layout.vectors, "_buffer": buffer, "_numbers": numbers}


def _from_dict(values: dict[str, Any]) -> TokenLayout:
    """The values may be anything: tensors that are traced, or what some function made of each."""
    layout = object.__new__(TokenLayout)
    vars(layout).update(values)
    numbers = values["_numbers"]
    if isinstance(numbers, Tensor) and numbers.device.type != "cpu":  # moved with the vectors
        vars(layout)["_numbers"] = numbers_of(layout)
    return layout


register_tree(TokenLayout, "lmfusion_kernels.TokenLayout", _to_dict, _from_dict)
