"""How does a document go on? Token by token with a key-value cache, many documents at a time."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmfusion.batch import Document
from lmfusion.generation.cache import KeyValueCache, check_context, generating, no_image_rows
from lmfusion.generation.sampling import check_decoding, check_list, generators, next_tokens

if TYPE_CHECKING:
    from lmfusion.modeling import LMFusion


def generate_text(
    model: "LMFusion",
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    chat: bool = False,
) -> list[str]:
    """What the text LLM writes after each prompt, up to eos or `max_new_tokens`, without the prompt.

    temperature 0 is greedy; otherwise chance is keyed by (seed, index of the prompt). With `chat`, a prompt is the
    user's turn in the tokenizer's chat template. BOI and EOI are never written.

    Raises ValueError for an empty list or prompt, numbers out of range, a document beyond the model's context, a model
    without tokenizer, or `chat` where the tokenizer has no chat template.
    """
    check_list(prompts, "prompts", batch_size)
    check_decoding(max_new_tokens, temperature, top_p)
    tokenizer = require_tokenizer(model)
    documents = [Document().text(_encode_prompt(tokenizer, prompt, chat)) for prompt in prompts]
    check_context(model, documents, max_new_tokens)
    answers: list[list[int]] = []
    with generating(model):
        for start in range(0, len(prompts), batch_size):
            batch = documents[start : start + batch_size]
            chance = generators(seed, range(start, start + len(batch)))
            answers += continue_documents(
                model, batch, None, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, chance=chance
            )
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def continue_documents(
    model: "LMFusion",
    documents: Sequence[Document],
    x_image: Tensor | None,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    chance: Sequence[torch.Generator],
) -> list[list[int]]:
    """Ids that follow each document, without the eos that ends them. To be called in `generating(model)`.

    Documents end with a text or marker row, and fit the context with what is to come. x_image: rows of their images,
    [num_image, d_image], or None.
    """
    longest = max(document.num_tokens for document in documents)
    cache = KeyValueCache(model, len(documents), longest + max_new_tokens)
    h_text = cache.read(model, documents, x_image)
    last_rows = [end - 1 for end in itertools.accumulate(len(document.token_ids) for document in documents)]
    h_last = h_text[torch.tensor(last_rows, device=h_text.device)]

    end_ids = end_token_ids(model)
    answers: list[list[int]] = [[] for _ in documents]
    running = set(range(len(documents)))
    while True:
        logits = model.text_logits(h_last)[:, : model.boi_token_id]  # without BOI and EOI, which come last
        next_ids = next_tokens(logits, temperature, top_p, chance)
        for row, token_id in enumerate(next_ids.tolist()):
            if row not in running:
                continue
            if token_id in end_ids:
                running.discard(row)
                continue
            answers[row].append(token_id)
            if len(answers[row]) == max_new_tokens:
                running.discard(row)
        if not running:
            return answers
        # Rows that have ended run along unheard
        x_text = model.embed(next_ids)
        layout = cache.layout([[("text", 1)]] * len(documents))
        h_last, _ = model.run_layers(x_text, no_image_rows(model, x_text), layout, cache.layers)
        cache.lengths = [length + 1 for length in cache.lengths]


def end_token_ids(model: "LMFusion") -> set[int]:
    """Tokens that end a document: those of the LLM's configuration, and its tokenizer's eos."""
    configured = getattr(model.config.text_config, "eos_token_id", None)
    ids = set(configured) if isinstance(configured, (list, tuple)) else {configured}
    if model.tokenizer is not None:
        ids.add(model.tokenizer.eos_token_id)
    return {token_id for token_id in ids if token_id is not None}


def require_tokenizer(model: "LMFusion") -> Any:
    """The model's tokenizer. Raises ValueError where it has none."""
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer; adapt it from a checkpoint with one, or set model.tokenizer")
    return model.tokenizer


def _encode_prompt(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template; leave chat off for a base model")
        turns = [{"role": "user", "content": prompt}]
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"])
    ids = list(tokenizer(prompt)["input_ids"])
    if not prompt or not ids:
        raise ValueError("a prompt is empty; write something to go on from")
    return ids
