"""What does the model read at once? Documents of text and images, packed into one batch of rows.

Two kinds of document are trained on, with BOI and EOI around every image:

    caption-first   [bos] caption BOI image EOI              the caption draws the image
    image-first     [bos] BOI image EOI caption              the image is described

bos is there where the tokenizer puts it by itself. eos is a label only: a row for it would predict nothing.

Of a vision-language model, documents may hold images that are seen, not drawn: rows of the text tower that its encoder
makes, without markers around them. Their place is kept by ids of VISION_ID.

With a frozen text tower the rows before a document's first image are constant: what the LLM says there is its own. The
image side may only put a BOI in its place, and that decision alone is scored.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmfusion.text.tokenization import token_ids
from lmfusion_kernels.layout.token_layout import TokenLayout

IGNORED = -100
"""Label of a row whose next token is not scored."""
VISION_ID = -1
"""Id of a row of an image that is seen. In a batch row k of them all, counted from 0, has the id -1 - k."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that documents are built with. The model owns BOI and EOI, its tokenizer the rest."""

    boi_token_id: int
    eoi_token_id: int
    bos_token_id: int | None = None
    """Put before every document; None for tokenizers that do not do so."""
    eos_token_id: int | None = None
    """What the last token of a document is taught to be followed by; None: nothing."""

    @classmethod
    def of(cls, tokenizer: Any, vocab_size: int) -> "SpecialTokens":
        """Those of a transformers tokenizer, with BOI and EOI right after a vocabulary of `vocab_size`."""
        [prefix] = token_ids(tokenizer, [""], control_tokens=True, add_special_tokens=True)
        bos = tokenizer.bos_token_id
        return cls(
            boi_token_id=vocab_size,
            eoi_token_id=vocab_size + 1,
            bos_token_id=bos if bos is not None and bos in prefix else None,
            eos_token_id=tokenizer.eos_token_id,
        )

    @property
    def bos(self) -> list[int]:
        return [] if self.bos_token_id is None else [self.bos_token_id]


@dataclass(frozen=True)
class Document:
    """One document in sequence order: its spans, and an id and a label for each of its rows in the text tower."""

    spans: tuple[tuple[str, int], ...] = ()
    """(modality, length) as `TokenLayout.from_spans` takes them."""
    token_ids: tuple[int, ...] = ()
    """One a text or marker row."""
    labels: tuple[int, ...] = field(default=())
    """One a text or marker row: the id that should follow, or -100."""
    is_given: tuple[bool, ...] = ()
    """One an image: whether it is shown as it is, as what an edit begins with, and not learned to be drawn."""

    @property
    def num_tokens(self) -> int:
        return sum(length for _, length in self.spans)

    @property
    def num_images(self) -> int:
        return sum(modality == "image" for modality, _ in self.spans)

    def text(self, ids: Sequence[int], is_scored: bool = True) -> "Document":
        """This document followed by text tokens. The last of them has no label until something follows.

        is_scored: whether rows are taught to be followed by these tokens. Not so what a user says.
        """
        if len(ids) == 0:
            return self
        labels = (*ids, IGNORED) if is_scored else (IGNORED,) * (len(ids) + 1)
        labels = (*self._followed_by(labels[0]), *labels[1:])
        spans, token_ids = (*self.spans, ("text", len(ids))), self.token_ids + tuple(ids)
        return replace(self, spans=spans, token_ids=token_ids, labels=labels)

    def seen(self, num_rows: int) -> "Document":
        """This document followed by an image that a vision encoder made that many rows of."""
        return self.text([VISION_ID] * num_rows, is_scored=False)

    @property
    def num_vision_tokens(self) -> int:
        """Rows of images that are seen."""
        return self.token_ids.count(VISION_ID)

    def marker(self, token_id: int, is_scored: bool = True) -> "Document":
        """This document followed by BOI or EOI. is_scored: as for `text`."""
        labels = (*self._followed_by(token_id if is_scored else IGNORED), IGNORED)
        spans, token_ids = (*self.spans, ("marker", 1)), (*self.token_ids, token_id)
        return replace(self, spans=spans, token_ids=token_ids, labels=labels)

    def image(self, num_tokens: int, is_given: bool = False) -> "Document":
        """This document followed by an image of that many rows. The row before an image is never scored.

        is_given: whether the image is shown without noise, and not learned to be drawn.
        """
        spans = (*self.spans, ("image", num_tokens))
        return replace(self, spans=spans, is_given=(*self.is_given, is_given))

    def end(self, eos_token_id: int | None) -> "Document":
        """This document with its last row labelled eos, if there is such a token."""
        return self if eos_token_id is None else replace(self, labels=self._followed_by(eos_token_id))

    def _followed_by(self, next_id: int) -> tuple[int, ...]:
        """The labels so far, once `next_id` is what comes next, or -100 for what is not taught."""
        if self.spans and self.spans[-1][0] != "image":  # image rows predict no token
            return (*self.labels[:-1], next_id)
        return self.labels


def encode_caption(tokenizer: Any, caption: str) -> list[int]:
    """Token ids of a caption, without bos and eos. Raises ValueError if it is empty."""
    if not caption.strip():
        raise ValueError("the caption is empty; write one, or leave the sample out")
    return encode_captions(tokenizer, [caption])[0]


def encode_captions(tokenizer: Any, captions: Sequence[str]) -> list[list[int]]:
    """Token ids of many captions, stripped, without bos and eos. Empty ones have none."""
    return token_ids(tokenizer, [caption.strip() for caption in captions], control_tokens=False)


def caption_first_document(caption_ids: Sequence[int], num_image_tokens: int, tokens: SpecialTokens) -> Document:
    """[bos] caption BOI image EOI. Without a caption (dropped for guidance) nothing after the image is scored:

    up to there such a document reads like an image-first one, which must not learn to end before its caption.
    """
    document = draw_prompt(caption_ids, tokens).image(num_image_tokens).marker(tokens.eoi_token_id)
    return document.end(tokens.eos_token_id) if caption_ids else document


def image_first_document(caption_ids: Sequence[int], num_image_tokens: int, tokens: SpecialTokens) -> Document:
    """[bos] BOI image EOI caption, ended by eos."""
    return caption_prompt(caption_ids, num_image_tokens, tokens).end(tokens.eos_token_id)


def draw_prompt(caption_ids: Sequence[int], tokens: SpecialTokens) -> Document:
    """[bos] caption BOI: what precedes an image to be drawn. Without a caption it is the unconditional prompt."""
    return Document().text([*tokens.bos, *caption_ids]).marker(tokens.boi_token_id)


def caption_prompt(prompt_ids: Sequence[int], num_image_tokens: int, tokens: SpecialTokens) -> Document:
    """[bos] BOI image EOI prompt: what precedes a caption to be written. The prompt may be empty."""
    opened = draw_prompt([], tokens).image(num_image_tokens)
    return opened.marker(tokens.eoi_token_id).text(list(prompt_ids))


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed documents and their images, ready for `LMFusion.forward`. All tensors lie on one device."""

    layout: TokenLayout
    token_ids: Tensor
    """int64 [num_text] in tower order (constant, then live rows); BOI and EOI by their own ids"""
    labels: Tensor
    """int64 [num_live]: the id that should follow each live row, or -100"""
    latents: Tensor
    """[B, C, h, w] clean latents of all images, in order of appearance"""
    noise: Tensor
    """like latents"""
    timesteps: Tensor
    """int64 [B]: the noise level of each image; 0 for one that is given"""
    sample_ids: tuple[str, ...]
    num_labels: int
    """Live rows with a label, counted on the host."""
    boi_target_indices: Tensor
    """int64 [num_boi_targets] constant rows with a label: an image begins after them, or text goes on"""
    boi_labels: Tensor
    """bool [num_boi_targets]: which of the two"""
    drawn: Tensor
    """int64 [num_target_images] indices of the images that are learned to be drawn; the others are given, without noise"""
    vision_embeds: Tensor | None = None
    """[num_vision, d_text] of images that are seen, row k for the id -1 - k; None where there are none"""

    @property
    def num_boi_targets(self) -> int:
        return self.boi_target_indices.shape[0]

    @property
    def num_images(self) -> int:
        return self.latents.shape[0]

    @property
    def num_target_images(self) -> int:
        return self.drawn.shape[0]

    def pin_memory(self) -> "Batch":
        """The same batch with its tensors in page-locked memory, so that copying it to a GPU need not be waited for."""
        return replace(
            self,
            token_ids=self.token_ids.pin_memory(),
            labels=self.labels.pin_memory(),
            latents=self.latents.pin_memory(),
            noise=self.noise.pin_memory(),
            timesteps=self.timesteps.pin_memory(),
            boi_target_indices=self.boi_target_indices.pin_memory(),
            boi_labels=self.boi_labels.pin_memory(),
            drawn=self.drawn.pin_memory(),
            vision_embeds=None if self.vision_embeds is None else self.vision_embeds.pin_memory(),
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`, copied without waiting for it."""
        return replace(
            self,
            layout=self.layout.to(device),
            token_ids=self.token_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            latents=self.latents.to(device, non_blocking=True),
            noise=self.noise.to(device, non_blocking=True),
            timesteps=self.timesteps.to(device, non_blocking=True),
            boi_target_indices=self.boi_target_indices.to(device, non_blocking=True),
            boi_labels=self.boi_labels.to(device, non_blocking=True),
            drawn=self.drawn.to(device, non_blocking=True),
            vision_embeds=None if self.vision_embeds is None else self.vision_embeds.to(device, non_blocking=True),
        )


def pack(
    documents: Sequence[Document],
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    *,
    sample_ids: Sequence[str] = (),
    frozen_text: bool = True,
    vision_embeds: Tensor | None = None,
) -> Batch:
    """Pack documents into one batch on the CPU.

    latents, noise: [B, C, h, w]; timesteps: integer [B]; one for each image span, in order of appearance. Those of
    given images are not looked at: they have timestep 0 and no noise.
    With `frozen_text`, rows before the first image are constant, and of their labels no more is scored than whether
    they are BOI.
    vision_embeds: [num_vision, d_text] of the images that are seen, in order of appearance; None: there are none.

    Raises ValueError when the counts or shapes do not fit.
    """
    num_images = sum(document.num_images for document in documents)
    if latents.dim() != 4 or latents.shape[0] != num_images:
        raise ValueError(
            f"the documents hold {num_images} images; latents [B, C, h, w] have shape {tuple(latents.shape)}"
        )
    if noise.shape != latents.shape or timesteps.shape != (num_images,):
        raise ValueError(
            f"noise {tuple(noise.shape)} must be shaped like latents {tuple(latents.shape)}, "
            f"and timesteps {tuple(timesteps.shape)} must be ({num_images},)"
        )
    num_vision_tokens, num_vision = sum(document.num_vision_tokens for document in documents), 0
    if vision_embeds is not None:
        num_vision = vision_embeds.shape[0]
    if num_vision_tokens != num_vision:
        raise ValueError(
            f"the documents hold {num_vision_tokens} rows of images that are seen, and vision_embeds {num_vision}"
        )
    is_given = torch.tensor([given for document in documents for given in document.is_given], dtype=torch.bool)
    layout = TokenLayout.from_spans([document.spans for document in documents], frozen_text=frozen_text)
    spans = [span for document in documents for span in document.spans]
    is_text = np.repeat([m != "image" for m, _ in spans], [n for _, n in spans]).astype(bool)
    rows = np.zeros((2, layout.num_tokens), np.int64)  # ids and labels in sequence order
    rows[0, is_text] = number_vision_tokens(documents)
    rows[1, is_text] = [i for document in documents for i in document.labels]
    text_rows = layout.tower_to_sequence[: layout.num_text].numpy()
    all_labels = rows[1, text_rows]
    labels = all_labels[layout.num_constant :]
    boi_target_indices = np.flatnonzero(all_labels[: layout.num_constant] != IGNORED)
    is_marker = np.repeat([m == "marker" for m, _ in spans], [n for _, n in spans]).astype(bool)
    boi_labels = np.isin(all_labels[boi_target_indices], rows[0, is_marker])
    return Batch(
        layout=layout,
        token_ids=torch.from_numpy(rows[0, text_rows]),
        labels=torch.from_numpy(labels),
        latents=latents,
        noise=noise,
        timesteps=timesteps.to(torch.int64).masked_fill(is_given.to(timesteps.device), 0),
        sample_ids=tuple(sample_ids),
        num_labels=int((labels != IGNORED).sum()),
        boi_target_indices=torch.from_numpy(boi_target_indices),
        boi_labels=torch.from_numpy(boi_labels),
        drawn=torch.nonzero(~is_given).flatten(),
        vision_embeds=vision_embeds,
    )


def number_vision_tokens(documents: Sequence[Document]) -> np.ndarray:
    """int64: the token ids of `documents`, one after the other, every VISION_ID replaced by -1 - k for the k-th of them."""
    ids = np.array([i for document in documents for i in document.token_ids], np.int64)
    is_seen = ids == VISION_ID
    ids[is_seen] = -1 - np.arange(is_seen.sum())
    return ids
