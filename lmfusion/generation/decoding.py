"""Which token comes next, and what text has it made? Sampling for a batch of unlike requests; text as it grows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

NO_TOKEN = -1
"""In place of a token that cannot be chosen."""
_HALF_CHARACTER = "�"


def random_generator(seed: int, *key: int) -> torch.Generator:
    """A CPU generator keyed by `seed` and `key`, so that neither its batch nor a device changes what it draws."""
    state = np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


class SamplingParams(NamedTuple):
    """How the next token of each of B documents is chosen; float32 on the device of the logits, [B] each."""

    allow_boi: Tensor
    """Above 0 where BOI may be chosen"""
    temperature: Tensor
    """0 takes the likeliest"""
    top_p: Tensor
    top_k: Tensor
    """at least 1"""
    uniform: Tensor
    """In [0, 1): the chance of this token"""


def next_tokens(logits: Tensor, choice: SamplingParams, is_greedy: bool) -> Tensor:
    """Token ids int64 [B] for logits [B, V + 2], BOI's and EOI's last; EOI is never chosen. NO_TOKEN where the logits
    are not finite: where one is NaN or infinite, or all are minus infinity.

    A document with temperature takes the token at its uniform, among the `top_k` likeliest and of those the likeliest
    that together reach probability `top_p`. is_greedy: all temperatures are 0.
    """
    logits = logits[:, :-1].float()
    boi = logits[:, -1:].masked_fill(choice.allow_boi[:, None] <= 0, -torch.inf)
    logits = torch.cat([logits[:, :-1], boi], dim=-1)
    largest = logits.amax(dim=-1, keepdim=True)  # NaN where there is one
    is_finite = largest.squeeze(-1).isfinite()
    likeliest = torch.where(is_finite, logits.argmax(dim=-1), NO_TOKEN)
    if is_greedy:
        return likeliest
    is_drawn = choice.temperature > 0
    scaled = (logits - largest) / torch.where(is_drawn, choice.temperature, 1.0)[:, None]
    probabilities, ids = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ids.shape[-1], device=ids.device)
    probabilities = torch.where(rank < choice.top_k[:, None], probabilities, 0.0)
    total = probabilities.cumsum(dim=-1)
    limit = choice.top_p[:, None] * total[:, -1:]
    reach = torch.where(total - probabilities < limit, probabilities, 0.0).cumsum(dim=-1)
    chosen = (reach <= choice.uniform[:, None] * reach[:, -1:]).sum(dim=-1, keepdim=True)
    drawn = ids.gather(-1, chosen.clamp(max=ids.shape[-1] - 1)).squeeze(-1)
    return torch.where(is_drawn & is_finite, drawn, likeliest)


class TextStream:
    """Text of token ids that come one by one: whole characters only, and nothing that may yet become a stop string."""

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        """before: ids that the text goes on from."""
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        self._ids = list(before)
        self._prefix = 0  # ids before it are shown and no longer looked at
        self._shown = len(self._ids)  # ids before it are shown; decoded again with what follows: some join with a space
        self._held = ""
        self.is_stopped = False
        """Whether a stop string has come; the text before it is all there is."""

    def push(self, token_id: int) -> str:
        """The text that `token_id` adds, as far as it can be shown yet."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._prefix : self._shown])
        after = self._decode(self._ids[self._prefix :])
        if len(after) <= len(before) or after.endswith(_HALF_CHARACTER):
            return ""
        self._prefix, self._shown = self._shown, len(self._ids)
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """What is left to show when no token follows in this stretch of text."""
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
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
