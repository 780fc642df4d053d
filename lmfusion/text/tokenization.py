"""Token ids of texts, and the control tokens in them. One thread tokenizes at a time, as tokenizers keep state."""

import re
import threading
from collections.abc import Collection, Sequence
from typing import Any

_LOCK = threading.Lock()


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Tokens that are not text, by id. Some tokenizers list their end of a turn only among the added tokens."""
    added = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def border_tokens(tokenizer: Any) -> set[str]:
    """Control tokens before which a text can be cut without changing its ids.

    Left out are tokens that strip the white space before them, or that match normalised text or whole words only.
    """
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    return {token.content for token in added if not (token.lstrip or token.normalized or token.single_word)}


def find_tokens(text: str, tokens: Collection[str]) -> re.Match[str] | None:
    """The first of `tokens` in `text`; its `re` finds them all, the longest where several begin at one place.

    A pattern of the few tokens in the text is far faster than one of the hundreds that some tokenizers have.
    """
    present = sorted((token for token in tokens if token and token in text), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, present))).search(text) if present else None


def token_ids(
    tokenizer: Any, texts: Sequence[str], *, control_tokens: bool, add_special_tokens: bool = False
) -> list[list[int]]:
    """Ids of each text.

    control_tokens: whether "<|im_end|>" in a text is the end of a turn; else it is the characters it is written with.
    add_special_tokens: add bos, and whatever else the tokenizer adds by itself.
    """
    if not texts:
        return []
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, or bytes of a command line that are not UTF-8
            raise ValueError(f"a text is not valid Unicode: {error.reason} at character {error.start}") from None
    with _LOCK:
        encoded = tokenizer(list(texts), add_special_tokens=add_special_tokens, split_special_tokens=not control_tokens)
    return encoded["input_ids"]
