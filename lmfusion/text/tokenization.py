"""Token ids of texts, one thread at a time, since tokenizers keep settings of a call; control tokens in texts."""

import re
import threading
from collections.abc import Collection, Sequence
from typing import Any

_LOCK = threading.Lock()


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Tokens that are no text, by id; some tokenizers name their end of a turn among the added tokens alone."""
    added = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def border_tokens(tokenizer: Any) -> set[str]:
    """Control tokens that a text can be cut before without a change in its ids.

    Not so where the tokenizer takes white space before a token away, or looks for it in normalised text or whole words.
    """
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    return {token.content for token in added if not (token.lstrip or token.normalized or token.single_word)}


def find_tokens(text: str, tokens: Collection[str]) -> re.Match[str] | None:
    """The first of `tokens` in `text`; its `re` finds them all, the longest where several begin at one place.

    A pattern of the few tokens that are there takes far less time than one of the hundreds that some tokenizers have.
    """
    there = sorted((token for token in tokens if token and token in text), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, there))).search(text) if there else None


def token_ids(
    tokenizer: Any, texts: Sequence[str], *, control_tokens: bool, add_special_tokens: bool = False
) -> list[list[int]]:
    """Ids of each text.

    control_tokens: whether "<|im_end|>" in a text is the end of a turn, or the characters it is written with.
    add_special_tokens: put bos before, and whatever else the tokenizer does by itself.
    """
    if not texts:
        return []
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, or bytes of a command line that are no UTF-8
            raise ValueError(f"a text is not valid Unicode: {error.reason} at character {error.start}") from None
    with _LOCK:
        encoded = tokenizer(list(texts), add_special_tokens=add_special_tokens, split_special_tokens=not control_tokens)
    return encoded["input_ids"]
