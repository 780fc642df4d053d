"""Log-likelihoods of texts by a model's text tower, with many texts packed into one forward pass."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

import lmfusion_kernels as lk
from lmfusion.generation.api import evaluating
from lmfusion.generation.prompt import context_limit, require_tokenizer
from lmfusion.text.tokenization import token_ids

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

BATCH_TOKENS = 2048
"""Tokens of one forward pass, unless a single text is longer."""
NO_LIMIT = 4096
"""Tokens of a window if the LLM does not say what its limit is."""
_MAX_LOGITS = 2**25
"""Logits in memory at a time: 128 MiB in float32."""


class Likelihood(NamedTuple):
    """Likelihood of a continuation after its context."""

    log_prob: float
    """Sum over the tokens, in nats."""
    is_greedy: bool
    """Whether each token is the most likely one."""


class Window(NamedTuple):
    """Tokens, the last `num_scored` of which are predicted from those before them."""

    token_ids: list[int]
    num_scored: int


def max_length(model: "LMFusion") -> int:
    """The context limit of the text tower, in tokens."""
    return context_limit(model) or NO_LIMIT


@torch.no_grad()
def score_windows(model: "LMFusion", windows: Sequence[Window], batch_tokens: int = BATCH_TOKENS) -> list[Likelihood]:
    """The likelihood of the scored tokens of each window, by the text tower alone.

    Windows are packed into forward passes of up to `batch_tokens` tokens, longest first, without padding. The LM head
    runs on scored positions only. Windows of more than `max_length(model)` + 1 tokens lose their first ones.

    Raises ValueError for a window that scores none or all of its tokens: nothing comes before the first one.
    """
    limit = max_length(model)
    truncated = []
    for ids, num_scored in windows:
        ids = ids[-(limit + 1) :]
        if not 1 <= num_scored < len(ids):
            raise ValueError(
                f"num_scored must be at least 1 and below the {len(ids)} tokens of the window, got {num_scored}"
            )
        truncated.append(Window(ids, num_scored))
    order = sorted(range(len(truncated)), key=lambda i: (-len(truncated[i].token_ids), truncated[i].token_ids))
    found: dict[int, Likelihood] = {}
    with evaluating(model):
        batch: list[int] = []
        num_tokens = 0
        for i in order:
            length = len(truncated[i].token_ids) - 1
            if batch and num_tokens + length > batch_tokens:
                found.update(zip(batch, _score_batch(model, [truncated[j] for j in batch]), strict=True))
                batch, num_tokens = [], 0
            batch.append(i)
            num_tokens += length
        if batch:
            found.update(zip(batch, _score_batch(model, [truncated[j] for j in batch]), strict=True))
    return [found[i] for i in range(len(windows))]


def rolling_windows(ids: Sequence[int], prefix: int, limit: int) -> list[Window]:
    """Windows in which each of `ids` is predicted once. The last one reaches back as far as `limit` tokens allow.

    prefix: the token before the first.
    """
    windows = []
    for start in range(0, len(ids), limit):
        end = min(start + limit, len(ids))
        first = max(0, end - limit)
        before = prefix if first == 0 else ids[first - 1]
        windows.append(Window([before, *ids[first:end]], end - start))
    return windows


def text_loss(model: "LMFusion", texts: Sequence[str], batch_tokens: int = BATCH_TOKENS) -> float:
    """Cross-entropy of plain texts by the model's text tower, in nats per token, over the tokens of all texts.

    Each text is a document of its own, after bos (eos if the tokenizer has no bos). Texts longer than the context are
    read in windows.

    Raises ValueError for texts without a token, and for a model without a tokenizer.
    """
    tokenizer = require_tokenizer(model)
    prefix = prefix_token_id(model)
    limit = max_length(model)
    windows = [
        window
        for ids in token_ids(tokenizer, list(texts), control_tokens=False)
        for window in rolling_windows(ids, prefix, limit)
    ]
    if not windows:
        raise ValueError("texts must hold at least one token, got none; give some text to score")
    total = sum(found.log_prob for found in score_windows(model, windows, batch_tokens))
    return -total / sum(window.num_scored for window in windows)


def prefix_token_id(model: "LMFusion") -> int:
    """The token before the first one of a text: bos, or else eos. Raises ValueError if there is neither."""
    tokenizer = require_tokenizer(model)
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ValueError(
        "the tokenizer must have a bos or eos token, after which a text is scored, got neither; set tokenizer.bos_token"
    )


def _score_batch(model: "LMFusion", windows: Sequence[Window]) -> list[Likelihood]:
    inputs = [window.token_ids[:-1] for window in windows]
    device = model.text.norm.weight.device
    layout = lk.TokenLayout.from_spans(
        [[("text", len(ids))] for ids in inputs], frozen_text=model.frozen_text, device=device
    )
    scored: list[int] = []
    targets: list[int] = []
    start = 0
    for ids, window in zip(inputs, windows, strict=True):
        end = start + len(ids)
        scored += range(end - window.num_scored, end)
        targets += window.token_ids[-window.num_scored :]
        start = end
    x_text = model.embed(torch.tensor([token for ids in inputs for token in ids], device=device))
    h_text, _ = model.run_layers(x_text, x_text.new_zeros(0, model.config.image_hidden_size), layout)
    h_text = h_text[torch.tensor(scored, device=device)]
    log_probs, likeliest = _log_probs(model, h_text, torch.tensor(targets, device=device))
    answers, start = [], 0
    for window in windows:
        end = start + window.num_scored
        answers.append(Likelihood(float(log_probs[start:end].sum()), bool(likeliest[start:end].all())))
        start = end
    return answers


def _log_probs(model: "LMFusion", h_text: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities float64 [n] of `targets` [n] after hidden states [n, d], and whether each is the likeliest."""
    vocab_size = model.boi_token_id
    found = []
    size = max(1, _MAX_LOGITS // vocab_size)
    for hidden, target_ids in zip(h_text.split(size), targets.split(size), strict=True):
        # BOI and EOI come after the vocabulary of the base LLM. They must not take probability from its tokens
        logits = model.text_logits(hidden)[:, :vocab_size].float()
        log_probs = logits.log_softmax(dim=-1).gather(1, target_ids[:, None])[:, 0]
        found.append((log_probs, logits.argmax(dim=-1) == target_ids))
    log_probs, likeliest = (torch.cat(parts) for parts in zip(*found, strict=True))
    return log_probs.double().cpu(), likeliest.cpu()
