"""Packs documents of text and images into batches for `LMFusion.forward`.

Two kinds of document are trained on, with BOI and EOI around every image:

    caption-first   [bos] caption BOI image EOI              the image is generated from its caption
    image-first     [bos] BOI image EOI caption              the image is described

bos is there if the tokenizer adds it by itself. eos is a label only: as a token it would predict nothing.

With a vision-language base, a document may also contain input images for its vision encoder: vision tokens of the text
tower, without markers around them. VISION_ID holds their places.

With a frozen text tower, the tokens before a document's first image are constant: what the LLM predicts there is its
own. The image side can only put a BOI in place of the next token, so that decision alone is scored there.

Shapes: B images, C channels of h x w latents.
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
"""Label of a token whose successor is not scored."""
VISION_ID = -1
"""Id of every vision token in a document. In a batch, vision token k, counted from 0, has the id -1 - k."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that documents are built with. The model owns BOI and EOI, its tokenizer the rest."""

    boi_token_id: int
    eoi_token_id: int
    bos_token_id: int | None = None
    """Put before every document; None for tokenizers that do not add it."""
    eos_token_id: int | None = None
    """The label of a document's last token; None: it has none."""

    @classmethod
    def of(cls, tokenizer: Any, vocab_size: int) -> "SpecialTokens":
        """The special tokens of a transformers tokenizer, with BOI and EOI after a vocabulary of `vocab_size`."""
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
    """One document in sequence order: its spans, and an id and a label for each token of the text tower."""

    spans: tuple[tuple[str, int], ...] = ()
    """(modality, length) as `TokenLayout.from_spans` takes them."""
    token_ids: tuple[int, ...] = ()
    """One per text or marker token."""
    labels: tuple[int, ...] = field(default=())
    """One per text or marker token: the id that should follow, or -100."""
    is_input: tuple[bool, ...] = ()
    """One per image of the image tower: whether it is an input, without noise, such as the source of an edit. Others
    are target images, which the model learns to generate."""

    @property
    def num_tokens(self) -> int:
        return sum(length for _, length in self.spans)

    @property
    def num_images(self) -> int:
        return sum(modality == "image" for modality, _ in self.spans)

    def text(self, ids: Sequence[int], is_scored: bool = True) -> "Document":
        """This document followed by text tokens. The last of them has no label until something follows.

        is_scored: whether these tokens are labels of the tokens before them. What a user writes is not scored.
        """
        if len(ids) == 0:
            return self
        labels = (*ids, IGNORED) if is_scored else (IGNORED,) * (len(ids) + 1)
        labels = (*self._followed_by(labels[0]), *labels[1:])
        spans, token_ids = (*self.spans, ("text", len(ids))), self.token_ids + tuple(ids)
        return replace(self, spans=spans, token_ids=token_ids, labels=labels)

    def input_image(self, num_vision_tokens: int) -> "Document":
        """This document followed by an input image for the vision encoder, as that many vision tokens."""
        return self.text([VISION_ID] * num_vision_tokens, is_scored=False)

    @property
    def num_vision_tokens(self) -> int:
        """Tokens of input images for the vision encoder."""
        return self.token_ids.count(VISION_ID)

    def marker(self, token_id: int, is_scored: bool = True) -> "Document":
        """This document followed by BOI or EOI. is_scored: as for `text`."""
        labels = (*self._followed_by(token_id if is_scored else IGNORED), IGNORED)
        spans, token_ids = (*self.spans, ("marker", 1)), (*self.token_ids, token_id)
        return replace(self, spans=spans, token_ids=token_ids, labels=labels)

    def image(self, num_tokens: int, is_input: bool = False) -> "Document":
        """This document followed by an image of that many image tokens. The token before an image is never scored.

        is_input: whether it is an input image, without noise, and not a target.
        """
        spans = (*self.spans, ("image", num_tokens))
        return replace(self, spans=spans, is_input=(*self.is_input, is_input))

    def end(self, eos_token_id: int | None) -> "Document":
        """This document with eos as the label of its last token, if the tokenizer has an eos."""
        return self if eos_token_id is None else replace(self, labels=self._followed_by(eos_token_id))

    def _followed_by(self, next_id: int) -> tuple[int, ...]:
        """The labels so far, if `next_id` comes next; -100 for a token that is not scored."""
        if self.spans and self.spans[-1][0] != "image":  # image tokens predict no token
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
    """[bos] caption BOI image EOI. Without a caption (dropped for guidance), nothing after the image is scored.

    Up to there such a document reads like an image-first one, which must not learn to end before its caption.
    """
    document = draw_prompt(caption_ids, tokens).image(num_image_tokens).marker(tokens.eoi_token_id)
    return document.end(tokens.eos_token_id) if caption_ids else document


def image_first_document(caption_ids: Sequence[int], num_image_tokens: int, tokens: SpecialTokens) -> Document:
    """[bos] BOI image EOI caption, ended by eos."""
    return caption_prompt(caption_ids, num_image_tokens, tokens).end(tokens.eos_token_id)


def draw_prompt(caption_ids: Sequence[int], tokens: SpecialTokens) -> Document:
    """[bos] caption BOI: what precedes an image to generate. Without a caption it is the unconditional prompt."""
    return Document().text([*tokens.bos, *caption_ids]).marker(tokens.boi_token_id)


def caption_prompt(prompt_ids: Sequence[int], num_image_tokens: int, tokens: SpecialTokens) -> Document:
    """[bos] BOI image EOI prompt: what precedes a caption to generate. The prompt may be empty."""
    opened = draw_prompt([], tokens).image(num_image_tokens)
    return opened.marker(tokens.eoi_token_id).text(list(prompt_ids))


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed documents and their images, ready for `LMFusion.forward`. All tensors are on one device."""

    layout: TokenLayout
    token_ids: Tensor
    """int64 [num_text] in tower order (constant, then live tokens); BOI and EOI by their own ids"""
    labels: Tensor
    """int64 [num_live]: the id that should follow each live token, or -100"""
    latents: Tensor
    """[B, C, h, w] clean latents of all images, in order of appearance"""
    noise: Tensor
    """like latents"""
    timesteps: Tensor
    """int64 [B]: the noise level of each image; 0 for an input image"""
    sample_ids: tuple[str, ...]
    num_labels: int
    """Live tokens with a label, counted on the host."""
    boi_target_indices: Tensor
    """int64 [num_boi_targets]: the constant tokens with a label, as indices into the text tower's tokens"""
    boi_labels: Tensor
    """bool [num_boi_targets]: whether an image begins after the token, so that BOI is its label; else text goes on"""
    target_image_indices: Tensor
    """int64 [num_target_images]: which images are targets; the others are inputs, without noise"""
    vision_embeds: Tensor | None = None
    """[num_vision, d_text] embeddings of the vision tokens, number k for the id -1 - k; None where there are none"""

    @property
    def num_boi_targets(self) -> int:
        return self.boi_target_indices.shape[0]

    @property
    def num_images(self) -> int:
        return self.latents.shape[0]

    @property
    def num_target_images(self) -> int:
        return self.target_image_indices.shape[0]

    def pin_memory(self) -> "Batch":
        """The same batch with its tensors in page-locked memory, so that copying it to a GPU does not block."""
        return replace(
            self,
            token_ids=self.token_ids.pin_memory(),
            labels=self.labels.pin_memory(),
            latents=self.latents.pin_memory(),
            noise=self.noise.pin_memory(),
            timesteps=self.timesteps.pin_memory(),
            boi_target_indices=self.boi_target_indices.pin_memory(),
            boi_labels=self.boi_labels.pin_memory(),
            target_image_indices=self.target_image_indices.pin_memory(),
            vision_embeds=None if self.vision_embeds is None else self.vision_embeds.pin_memory(),
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`; the copy does not block."""
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
            target_image_indices=self.target_image_indices.to(device, non_blocking=True),
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

    latents, noise: [B, C, h, w]; timesteps: integer [B]; one for each image span, in order of appearance. Noise and
    timesteps of input images are ignored: they have timestep 0 and no noise.
    frozen_text: the tokens before a document's first image are constant; only whether their label is BOI is scored.
    vision_embeds: [num_vision, d_text], embeddings of the vision tokens in order of appearance; None: there are none.

    Raises ValueError when the counts or shapes do not fit.
    """
    num_images = sum(document.num_images for document in documents)
    if latents.dim() != 4 or latents.shape[0] != num_images:
        raise ValueError(
            f"latents must be [B, C, h, w] with one entry for each of the documents' {num_images} images, got shape "
            f"{tuple(latents.shape)}"
        )
    if noise.shape != latents.shape or timesteps.shape != (num_images,):
        raise ValueError(
            f"noise must be shaped like latents, {tuple(latents.shape)}, and timesteps ({num_images},), got "
            f"{tuple(noise.shape)} and {tuple(timesteps.shape)}"
        )
    num_vision_tokens, num_vision = sum(document.num_vision_tokens for document in documents), 0
    if vision_embeds is not None:
        num_vision = vision_embeds.shape[0]
    if num_vision_tokens != num_vision:
        raise ValueError(f"vision_embeds must hold the documents' {num_vision_tokens} vision tokens, got {num_vision}")
    is_input = torch.tensor([flag for document in documents for flag in document.is_input], dtype=torch.bool)
    layout = TokenLayout.from_spans([document.spans for document in documents], frozen_text=frozen_text)
    spans = [span for document in documents for span in document.spans]
    is_text = np.repeat([m != "image" for m, _ in spans], [n for _, n in spans]).astype(bool)
    ids, next_ids = np.zeros((2, layout.num_tokens), np.int64)  # in sequence order
    ids[is_text] = number_vision_tokens(documents)
    next_ids[is_text] = [i for document in documents for i in document.labels]
    text_order = layout.tower_to_sequence[: layout.num_text].numpy()
    all_labels = next_ids[text_order]
    labels = all_labels[layout.num_constant :]
    boi_target_indices = np.flatnonzero(all_labels[: layout.num_constant] != IGNORED)
    is_marker = np.repeat([m == "marker" for m, _ in spans], [n for _, n in spans]).astype(bool)
    boi_labels = np.isin(all_labels[boi_target_indices], ids[is_marker])
    return Batch(
        layout=layout,
        token_ids=torch.from_numpy(ids[text_order]),
        labels=torch.from_numpy(labels),
        latents=latents,
        noise=noise,
        timesteps=timesteps.to(torch.int64).masked_fill(is_input.to(timesteps.device), 0),
        sample_ids=tuple(sample_ids),
        num_labels=int((labels != IGNORED).sum()),
        boi_target_indices=torch.from_numpy(boi_target_indices),
        boi_labels=torch.from_numpy(boi_labels),
        target_image_indices=torch.nonzero(~is_input).flatten(),
        vision_embeds=vision_embeds,
    )


def number_vision_tokens(documents: Sequence[Document]) -> np.ndarray:
    """int64: the token ids of `documents`, one after the other, with -1 - k in place of the k-th VISION_ID."""
    ids = np.array([i for document in documents for i in document.token_ids], np.int64)
    is_vision = ids == VISION_ID
    ids[is_vision] = -1 - np.arange(is_vision.sum())
    return ids
