"""How are tokens that were read once not read again? Keys and values of every layer, one stretch of rows a document."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmfusion.batch import Document
from lmfusion.conversion.architectures import sliding_window
from lmfusion_kernels import layout as layouts
from lmfusion_kernels.layout import TokenLayout

if TYPE_CHECKING:
    from lmfusion.modeling import LMFusion


class KeyValueCache:
    """Keys and values of `num_documents` documents of up to `capacity` tokens each.

    Document `d` owns the rows [d * capacity, (d + 1) * capacity) of each layer's tensors and has filled `lengths[d]` of
    them. A layout that continues the documents writes behind that; until `lengths` is advanced, the next one writes
    the same rows again, which is how every denoising step replaces the image of the step before.
    """

    layers: list[tuple[Tensor, Tensor]]
    """(k, v) of each layer, [num_documents * capacity, H_kv, D]"""
    lengths: list[int]
    """Tokens held for each document."""

    def __init__(self, model: "LMFusion", num_documents: int, capacity: int) -> None:
        text_config = model.config.text_config
        shape = (num_documents * capacity, text_config.num_key_value_heads, model.config.head_dim)
        like = model.embed(torch.empty(0, dtype=torch.int64, device=model.device))  # dtype and device that rows have
        # Zeros, not garbage: a masked key has weight 0, and 0 times NaN would be NaN
        self.layers = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(text_config.num_hidden_layers)]
        self.lengths = [0] * num_documents
        self.capacity = capacity
        self._device = like.device

    def layout(self, continuations: Sequence[layouts.Document]) -> TokenLayout:
        """The layout of tokens that continue each document, given as spans of (modality, length)."""
        return TokenLayout.from_spans(
            continuations, device=self._device, cached_lengths=self.lengths, cache_capacity=self.capacity
        )

    def read(self, model: "LMFusion", documents: Sequence[Document], x_image: Tensor | None = None) -> Tensor:
        """Read the beginnings of all documents; returns the text tower's output [num_text, d_text] in sequence order.

        x_image: rows of the images in the documents, [num_image, d_image]; None where there are none.
        """
        layout = self.layout([document.spans for document in documents])
        token_ids = [token_id for document in documents for token_id in document.token_ids]
        x_text = model.embed(torch.tensor(token_ids, dtype=torch.int64, device=self._device))
        x_image = no_image_rows(model, x_text) if x_image is None else x_image.to(x_text.dtype)
        h_text, _ = model.run_layers(x_text, x_image, layout, self.layers)
        self.lengths = [document.num_tokens for document in documents]
        return h_text


def no_image_rows(model: "LMFusion", x_text: Tensor) -> Tensor:
    """Rows [0, d_image] for a step that has no image."""
    return x_text.new_empty(0, model.config.image_hidden_size)


def check_context(model: "LMFusion", documents: Sequence[Document], num_new: int) -> None:
    """Raise ValueError when a document with `num_new` more tokens exceeds the LLM's positions or its window."""
    num_tokens = max(document.num_tokens for document in documents) + num_new
    text_config = model.config.text_config
    limits = (getattr(text_config, "max_position_embeddings", None), sliding_window(text_config))
    limit = min((limit for limit in limits if limit is not None), default=num_tokens)
    if num_tokens > limit:
        raise ValueError(
            f"a document of {num_tokens - num_new} tokens and {num_new} new ones need {num_tokens}, "
            f"but the model's context is {limit}; shorten one or the other"
        )


@contextmanager
def generating(model: "LMFusion") -> Iterator[None]:
    """Without gradients and in evaluation mode; training mode comes back afterwards.

    Not torch's inference mode: what a sharded model makes there for keeps could not be trained with any more.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
