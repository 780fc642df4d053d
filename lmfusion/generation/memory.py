"""How much memory does an engine take? Counted before anything is allocated."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lmfusion.generation.prompt import context_limit
from lmfusion.utils.free_memory import free_bytes

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

DEFAULT_CONTEXT = 4096
"""Tokens a request is taken to need where the LLM names no limit, or a longer one."""
CACHE_SHARE = 0.5
"""Of the memory that is free, what the cache takes at most by default."""


@dataclass(frozen=True)
class MemoryPlan:
    """What an engine holds, in bytes, and the tokens it has room for."""

    num_rows: int
    """Tokens in the key-value cache."""
    row_bytes: int
    """Keys and values of one token in all layers."""
    text_bytes: int
    """Weights of the text tower, and of a vision-language model's encoder."""
    image_bytes: int
    """Weights of the image tower."""
    codec_bytes: int
    logit_bytes: int
    """Logits of a full batch, float32, with the copy that sampling sorts."""

    @property
    def cache_bytes(self) -> int:
        return self.num_rows * self.row_bytes

    @property
    def total_bytes(self) -> int:
        return self.cache_bytes + self.text_bytes + self.image_bytes + self.codec_bytes + self.logit_bytes

    def __str__(self) -> str:
        weights = f"text {_megabytes(self.text_bytes)}, image {_megabytes(self.image_bytes)}"
        if self.codec_bytes:
            weights += f", autoencoder {_megabytes(self.codec_bytes)}"
        return (
            f"key-value cache  {_megabytes(self.cache_bytes)}: {self.num_rows:,} tokens of {self.row_bytes:,} bytes\n"
            f"weights          {weights}\n"
            f"logits           {_megabytes(self.logit_bytes)}\n"
            f"together         {_megabytes(self.total_bytes)}, and the working memory of a step"
        )


def plan_memory(model: "LMFusion", num_rows: int | None, max_batch: int) -> MemoryPlan:
    """The plan of an engine with `num_rows` rows of cache; None: room for `max_batch` requests of the LLM's context, as
    far as half of the free memory allows.

    Raises ValueError for num_rows below 1.
    """
    if num_rows is not None and num_rows < 1:
        raise ValueError(f"num_rows is {num_rows}; the key-value cache needs at least 1")
    text_config = model.config.text_config
    dtype = model.embed(torch.empty(0, dtype=torch.int64, device=model.device)).dtype
    row_bytes = (
        2 * text_config.num_hidden_layers * text_config.num_key_value_heads * model.config.head_dim * dtype.itemsize
    )
    if num_rows is None:
        context = min(context_limit(model) or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
        affordable = int(CACHE_SHARE * free_bytes(model.device)) // row_bytes
        num_rows = max(context, min(max_batch * context, affordable))
    return MemoryPlan(
        num_rows=num_rows,
        row_bytes=row_bytes,
        text_bytes=_bytes(model.text) + (0 if model.vision is None else _bytes(model.vision)),
        image_bytes=_bytes(model.image),
        codec_bytes=_bytes(model.codec),
        logit_bytes=max_batch * (text_config.vocab_size + 2) * 4 * 2,
    )


def _bytes(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
