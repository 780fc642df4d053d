"""The memory plan of an engine: bytes of cache, weights and logits, counted before anything is allocated."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lmfusion.generation.prompt import context_limit
from lmfusion.utils.free_memory import free_bytes

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

DEFAULT_CONTEXT = 4096
"""Tokens that a request is assumed to need if the LLM has no limit, or a higher one."""
CACHE_SHARE = 0.5
"""The largest share of the free memory that the cache takes by default."""


@dataclass(frozen=True)
class MemoryPlan:
    """What an engine holds, in bytes, and how many tokens fit into its cache."""

    num_slots: int
    """Slots of the key-value cache, one per token."""
    slot_bytes: int
    """Keys and values of one token in all layers."""
    text_bytes: int
    """Weights of the text tower, and of the vision encoder if there is one."""
    image_bytes: int
    """Weights of the image tower."""
    codec_bytes: int
    logit_bytes: int
    """Logits of a full batch in float32, with the copy that sampling sorts."""

    @property
    def cache_bytes(self) -> int:
        return self.num_slots * self.slot_bytes

    @property
    def total_bytes(self) -> int:
        return self.cache_bytes + self.text_bytes + self.image_bytes + self.codec_bytes + self.logit_bytes

    def __str__(self) -> str:
        weights = f"text {_megabytes(self.text_bytes)}, image {_megabytes(self.image_bytes)}"
        if self.codec_bytes:
            weights += f", autoencoder {_megabytes(self.codec_bytes)}"
        return (
            f"key-value cache  {_megabytes(self.cache_bytes)}: {self.num_slots:,} tokens of {self.slot_bytes:,} bytes\n"
            f"weights          {weights}\n"
            f"logits           {_megabytes(self.logit_bytes)}\n"
            f"total            {_megabytes(self.total_bytes)}, and the working memory of a step"
        )


def plan_memory(model: "LMFusion", num_slots: int | None, max_batch: int) -> MemoryPlan:
    """The plan of an engine with `num_slots` slots of cache. None: slots for `max_batch` requests of the LLM's context,
    in at most half of the free memory.

    Raises ValueError for num_slots below 1.
    """
    if num_slots is not None and num_slots < 1:
        raise ValueError(f"num_slots must be at least 1, got {num_slots}")
    text_config = model.config.text_config
    dtype = model.embed(torch.empty(0, dtype=torch.int64, device=model.device)).dtype
    slot_bytes = (
        2 * text_config.num_hidden_layers * text_config.num_key_value_heads * model.config.head_dim * dtype.itemsize
    )
    if num_slots is None:
        context = min(context_limit(model) or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
        affordable = int(CACHE_SHARE * free_bytes(model.device)) // slot_bytes
        num_slots = max(context, min(max_batch * context, affordable))
    return MemoryPlan(
        num_slots=num_slots,
        slot_bytes=slot_bytes,
        text_bytes=_bytes(model.text) + (0 if model.vision is None else _bytes(model.vision)),
        image_bytes=_bytes(model.image),
        codec_bytes=_bytes(model.codec),
        logit_bytes=max_batch * (text_config.vocab_size + 2) * 4 * 2,
    )


def _bytes(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
