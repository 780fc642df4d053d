"""Decoding: samples the next token of each document of a batch, and turns token ids into text as they come."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

NO_TOKEN = -1
"""Stands for the token of a document whose logits are not finite."""
_HALF_CHARACTER = "�"


def random_generator(seed: int, *key: int) -> torch.Generator:
    """A CPU generator keyed by `seed` and `key`.

    Every request has generators of its own, and on the CPU: neither the batch nor the device changes its random
    numbers.
    """
    state = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


class SamplingParams(NamedTuple):
    """How the next token of each of B documents is sampled: float32 [B] each, on the device of the logits."""

    allow_boi: Tensor
    """Above 0 where BOI is allowed"""
    temperature: Tensor
    """0: the most likely token"""
    top_p: Tensor
    top_k: Tensor
    """at least 1"""
    uniform: Tensor
    """In [0, 1): the random number of this token"""


def next_tokens(logits: Tensor, params: SamplingParams, is_greedy: bool) -> Tensor:
    """Token ids int64 [B] for logits [B, V + 2], with BOI's and EOI's logits last.

    EOI is never sampled. NO_TOKEN stands where the logits are not finite: one is NaN or plus infinity, or all are minus
    infinity. With a temperature, the token is the one at `uniform` in the cumulative distribution, restricted first to
    the `top_k` likeliest tokens and then to the likeliest ones that together reach the probability `top_p`.
    is_greedy: all temperatures are 0; the sort is then left out.
    """
    logits = logits[:, :-1].float()
    boi = logits[:, -1:].masked_fill(params.allow_boi[:, None] <= 0, -torch.inf)
    logits = torch.cat([logits[:, :-1], boi], dim=-1)
    largest = logits.amax(dim=-1, keepdim=True)  # NaN if any logit is NaN
    is_finite = largest.squeeze(-1).isfinite()
    likeliest = torch.where(is_finite, logits.argmax(dim=-1), NO_TOKEN)
    if is_greedy:
        return likeliest
    is_sampled = params.temperature > 0
    scaled = (logits - largest) / torch.where(is_sampled, params.temperature, 1.0)[:, None]
    probabilities, ids = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ids.shape[-1], device=ids.device)
    probabilities = torch.where(rank < params.top_k[:, None], probabilities, 0.0)
    total = probabilities.cumsum(dim=-1)
    limit = params.top_p[:, None] * total[:, -1:]
    # A token is kept if those before it have not reached the limit yet, so the likeliest one always is
    reach = torch.where(total - probabilities < limit, probabilities, 0.0).cumsum(dim=-1)
    chosen = (reach <= params.uniform[:, None] * reach[:, -1:]).sum(dim=-1, keepdim=True)
    sampled = ids.gather(-1, chosen.clamp(max=ids.shape[-1] - 1)).squeeze(-1)
    return torch.where(is_sampled & is_finite, sampled, likeliest)


class TextStream:
    """Text of token ids that come one by one: whole characters only, without what may still become a stop string."""

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        """before: ids that the text continues."""
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        self._ids = list(before)
        # Tokenizers may join two tokens with or without a space, so a token is decoded together with the ones before
        # it: ids from _prefix to _shown were shown already, but are decoded again with the next ones.
        self._prefix = 0
        self._shown = len(self._ids)
        self._held = ""
        self.is_stopped = False
        """Whether a stop string has come; the text before it is the whole text."""

    def push(self, token_id: int) -> str:
        """The text that `token_id` adds, as far as it can be shown already."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._prefix : self._shown])
        after = self._decode(self._ids[self._prefix :])
        if len(after) <= len(before) or after.endswith(_HALF_CHARACTER):
            return ""
        self._prefix, self._shown = self._shown, len(self._ids)
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """The rest of the text, when an image or the end of the answer follows."""
        before = self._decode(self._ids[self._prefix : self._shown])
        rest = self._decode(self._ids[self._prefix :])[len(before) :]
        text = self._release(rest) + self._held
        self._ids, self._prefix, self._shown, self._held = [], 0, 0, ""
        return text

    def _release(self, text: str) -> str:
        if self.is_stopped:
            return ""
        text = self._held + text
        found = [i for i in (text.find(stop) for stop in self._stop_strings) if i >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`, and not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
