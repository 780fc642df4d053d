"""Which token comes next, and where does chance come from? Every document has a generator of its own."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """CPU generators keyed by (seed, index), so that neither its batch nor a device changes an item.

    Raises ValueError for a negative seed.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; it is 0 or more")
    keys = [int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]) for index in indices]
    return [torch.Generator().manual_seed(key) for key in keys]


def next_tokens(logits: Tensor, temperature: float, top_p: float, chance: Sequence[torch.Generator]) -> Tensor:
    """Token ids int64 [B] for logits [B, V].

    temperature 0 takes the likeliest. Otherwise each row draws one number from its generator and takes the token at
    that quantile, among the likeliest tokens that together reach probability `top_p`.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, ids = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    total = probabilities.cumsum(dim=-1)
    reach = torch.where(total - probabilities < top_p, probabilities, 0).cumsum(dim=-1)
    quantile = torch.stack([torch.rand((), generator=generator) for generator in chance]).to(logits.device)
    rank = (reach <= quantile[:, None] * reach[:, -1:]).sum(dim=-1, keepdim=True)
    return ids.gather(-1, rank.clamp(max=ids.shape[-1] - 1)).squeeze(-1)


def check_decoding(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raise ValueError for numbers outside their range."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}; it must be a finite number, 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")


def check_list(items: Any, name: str, batch_size: int) -> None:
    """Raise ValueError unless `items` is a list with something in it, to be worked on `batch_size` at a time."""
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise ValueError(f"{name} is {items!r}; give a list, also for a single one")
    if len(items) == 0:
        raise ValueError(f"{name} is empty; give at least one")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
