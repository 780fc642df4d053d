"""How does a conversation of texts and images become one document? The tokenizer's chat template, images in place.

A message is a dict {"role": "system" | "user" | "assistant", "content": ...}; content is a text, or a list of texts,
images, {"type": "text", "text": ...} and {"type": "image", "image": ...}, as in OpenAI's and transformers' chats. What
an image is, is the caller's matter: any object goes through as it is.

The template writes control tokens; a control token spelled in a message is text, and cannot end a turn.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from lmfusion.tokens import control_tokens, token_ids

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant")

_OPEN, _CLOSE = "\ue000", "\ue001"  # private-use characters around the number of what is held back from the template
_MESSAGE_EXPECTED = 'message like {"role": "user", "content": "Draw a cat."}; roles are ' + ", ".join(ROLES)


def encode_chat(
    tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = True
) -> list[list[int] | Any]:
    """Runs of token ids and the images between them, in their order; bos is among the ids where the template puts it.

    add_generation_prompt: end with what opens the assistant's turn. A last message of the assistant is otherwise closed
    as every turn is.

    Raises ValueError for messages that are no such, an empty conversation, or a tokenizer without chat template.
    """
    rendered, held = _render(tokenizer, messages, add_generation_prompt)
    parts: list[list[int] | Any] = []
    for i, piece in enumerate(re.split(f"{_OPEN}(\\d+){_CLOSE}", rendered)):
        part = held[int(piece)] if i % 2 else piece
        if isinstance(part, str):
            [ids] = token_ids(tokenizer, [str(part)], control_tokens=not isinstance(part, _Literal))
            if parts and isinstance(parts[-1], list):
                parts[-1].extend(ids)
            elif ids:
                parts.append(list(ids))
        else:
            parts.append(part)
    return parts


def _render(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool) -> tuple[str, list[Any]]:
    """The conversation as the template writes it, and what the numbered placeholders in it stand for."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template; leave chat off for a base model")
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages are {messages!r:.80}; give a list of at least one {_MESSAGE_EXPECTED}")
    held: list[Any] = []
    longest_first = sorted(control_tokens(tokenizer).values(), key=len, reverse=True)
    literal = re.compile("|".join([*map(re.escape, longest_first), f"[{_OPEN}{_CLOSE}]"]))

    def hold(part: Any) -> str:
        held.append(part)
        return f"{_OPEN}{len(held) - 1}{_CLOSE}"

    turns = []
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES or "content" not in message:
            raise ValueError(f"a message is {message!r:.80}; it is a {_MESSAGE_EXPECTED}")
        content = message["content"]
        parts = [content] if isinstance(content, str) or not isinstance(content, Sequence) else content
        # Texts that stand side by side are one: a control token may be spelled across them
        runs = itertools.groupby(map(_plain, parts), key=lambda part: isinstance(part, str))
        text = "".join(
            literal.sub(lambda match: hold(_Literal(match[0])), "".join(run)) if is_text else "".join(map(hold, run))
            for is_text, run in runs
        )
        turns.append({"role": message["role"], "content": text})
    try:
        rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=add_generation_prompt, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"the chat template does not take this conversation: {error}") from error
    return rendered, held


class _Literal(str):
    """A control token or placeholder sign that somebody wrote in a message."""


def _plain(part: Any) -> Any:
    """A text or an image from a part of a message's content."""
    if isinstance(part, Mapping):
        kind = part.get("type")
        if kind not in ("text", "image") or kind not in part or (kind == "text" and not isinstance(part["text"], str)):
            raise ValueError(
                f'a part of a message is {part!r:.80}; it is {{"type": "text", "text": ...}} or '
                '{"type": "image", "image": ...}'
            )
        return part[kind]
    return part
