"""How does a conversation of texts and images become one document? The tokenizer's chat template, images in place.

A message is a dict {"role": "system" | "user" | "assistant", "content": ...}; content is a text, or a list of texts,
images, {"type": "text", "text": ...} and {"type": "image", "image": ...}, as in OpenAI's and transformers' chats. What
an image is, is the caller's matter: any object goes through as it is.

The template writes control tokens; a control token spelled in a message is text, and cannot end a turn.

The template of a vision-language model decides where an image stands that is shown to it: it gets contents as lists,
and writes the model's image token. Images of the assistant are drawn, and stay where they are among its words.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from lmfusion.tokens import control_tokens, token_ids

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant")

_OPEN, _CLOSE = "\ue000", "\ue001"  # private-use characters around the number of what is held back from the template
_MESSAGE_EXPECTED = 'message like {"role": "user", "content": "Draw a cat."}; roles are ' + ", ".join(ROLES)


class Seen(NamedTuple):
    """An image that a vision-language model is shown, in place of its image token."""

    image: Any


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    image_token_id: int | None = None,
) -> list[list[int] | Any]:
    """Runs of token ids and the images between them, in their order; bos is among the ids where the template puts it.

    add_generation_prompt: end with what opens the assistant's turn. A last message of the assistant is otherwise closed
    as every turn is. image_token_id: of a vision-language model; images of others than the assistant are then `Seen`,
    and bos comes first even where the template writes none: ids are those of transformers' processor.

    Raises ValueError for messages that are no such, an empty conversation, or a tokenizer without chat template.
    """
    conversation = _Conversation(tokenizer, image_token_id)
    rendered = conversation.render(messages, add_generation_prompt)
    parts: list[list[int] | Any] = []

    def add(part: list[int] | Any) -> None:
        if not isinstance(part, list):
            parts.append(part)
        elif parts and isinstance(parts[-1], list):
            parts[-1].extend(part)
        elif part:
            parts.append(list(part))

    if image_token_id is not None and tokenizer.bos_token and not rendered.startswith(tokenizer.bos_token):
        [prefix] = token_ids(tokenizer, [""], control_tokens=True, add_special_tokens=True)
        add([token_id for token_id in prefix if token_id == tokenizer.bos_token_id])
    seen = iter(conversation.seen)
    num_places = 0
    for i, piece in enumerate(re.split(f"{_OPEN}(\\d+){_CLOSE}", rendered)):
        part = conversation.held[int(piece)] if i % 2 else piece
        if not isinstance(part, str):
            add(part)
            continue
        [ids] = token_ids(tokenizer, [str(part)], control_tokens=not isinstance(part, _Literal))
        # Among the ids, not in the text: how tokenizers treat the words after a control token is their own affair
        for is_image, run in itertools.groupby(ids, key=lambda token_id: token_id == image_token_id):
            run_ids = list(run)
            num_places += len(run_ids) if is_image else 0
            for item in itertools.islice(seen, len(run_ids)) if is_image else [run_ids]:
                add(item)
    if num_places != len(conversation.seen):
        raise ValueError(
            f"the chat template writes {num_places} image tokens for {len(conversation.seen)} images of a conversation"
        )
    return parts


class _Conversation:
    """What a conversation is made of while the template writes it."""

    def __init__(self, tokenizer: Any, image_token_id: int | None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template; leave chat off for a base model")
        self.held: list[Any] = []
        """What the numbered placeholders stand for."""
        self.seen: list[Seen] = []
        """Images in place of image tokens."""
        self._tokenizer = tokenizer
        self._is_vlm = image_token_id is not None
        control = set(control_tokens(tokenizer).values())
        if image_token_id is not None:
            control.add(tokenizer.convert_ids_to_tokens(image_token_id))
        longest_first = sorted(control, key=len, reverse=True)
        self._literal = re.compile("|".join([*map(re.escape, longest_first), f"[{_OPEN}{_CLOSE}]"]))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The conversation as the template writes it."""
        if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
            raise ValueError(f"messages are {messages!r:.80}; give a list of at least one {_MESSAGE_EXPECTED}")
        turns = []
        for message in messages:
            if not isinstance(message, Mapping) or message.get("role") not in ROLES or "content" not in message:
                raise ValueError(f"a message is {message!r:.80}; it is a {_MESSAGE_EXPECTED}")
            content = message["content"]
            parts = [content] if isinstance(content, str) or not isinstance(content, Sequence) else content
            # Texts that stand side by side are one: a control token may be spelled across them
            runs = [
                ("".join(run) if is_text else list(run))
                for is_text, run in itertools.groupby(map(_plain, parts), key=lambda part: isinstance(part, str))
            ]
            role = message["role"]
            if self._is_vlm and role != "assistant":
                turns.append({"role": role, "content": self._shown(runs)})
            else:
                text = "".join(
                    self._protect(run) if isinstance(run, str) else "".join(map(self._hold, run)) for run in runs
                )
                turns.append({"role": role, "content": [{"type": "text", "text": text}] if self._is_vlm else text})
        try:
            return self._tokenizer.apply_chat_template(
                turns, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template does not take this conversation: {error}") from error

    def _shown(self, runs: Sequence[str | list[Any]]) -> list[dict[str, str]]:
        """The content of a message with images that are seen."""
        texts = [run for run in runs if isinstance(run, str)]
        # Templates may move images away from between two texts, in which nobody shall spell a control token then
        num_literal = sum(len(self._literal.findall(text)) for text in texts)
        border = self._hold(_Literal("")) if len(self._literal.findall("".join(texts))) > num_literal else ""
        content: list[dict[str, str]] = []
        for run in runs:
            if isinstance(run, str):
                content.append({"type": "text", "text": border + self._protect(run)})
            else:
                self.seen += map(Seen, run)
                content += [{"type": "image"}] * len(run)
        return content

    def _protect(self, text: str) -> str:
        """`text` with control tokens and signs of placeholders held back."""
        return self._literal.sub(lambda match: self._hold(_Literal(match[0])), text)

    def _hold(self, part: Any) -> str:
        self.held.append(part)
        return f"{_OPEN}{len(self.held) - 1}{_CLOSE}"


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
