"""Conversations of texts and images as one document: the tokenizer's chat template, images in their places.

A message is a dict {"role": "system" | "user" | "assistant", "content": ...}; content is a text, or a list of texts,
images, {"type": "text", "text": ...} and {"type": "image", "image": ...}, as in OpenAI's and transformers' chats. What
an image is, is the caller's matter: any object goes through as it is.

The template writes control tokens; a control token spelled in a message is text, and cannot end a turn.

The template of a vision-language model decides where an image stands that is shown to it: it gets contents as lists,
and writes the model's image token. Images of the assistant are drawn, and stay where they are among its words.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lmfusion.text.chat_template import check_template_variables, render
from lmfusion.text.tokenization import border_tokens, control_tokens, find_tokens, token_ids

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant")

_MESSAGE_EXPECTED = 'message like {"role": "user", "content": "Draw a cat."}; roles are ' + ", ".join(ROLES)


class InputImage(NamedTuple):
    """An image that a vision-language model is shown, in place of its image token."""

    image: Any


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    image_token_id: int | None = None,
    template_variables: Mapping[str, Any] | None = None,
) -> list[list[int] | Any]:
    """Runs of token ids and the images between them, in their order; bos is among the ids where the template puts it.

    add_generation_prompt: end with what opens the assistant's turn. A last message of the assistant is otherwise closed
    as every turn is. image_token_id: of a vision-language model; images of others than the assistant are then `InputImage`,
    and bos comes first even where the template writes none: ids are those of transformers' processor.
    template_variables: what the template reads besides, see `lmfusion.text.chat_template`.

    Raises ValueError for invalid messages or variables, an empty conversation, a tokenizer without chat
    template, or a template that does not take the conversation.
    """
    chat = Chat(tokenizer, messages, image_token_id, template_variables)
    return chat.read(chat.write(len(messages), add_generation_prompt), len(messages))


class Chat:
    """A conversation that the template can write up to any of its messages.

    Images, and control tokens that somebody spelled in a message, are held back from the template, which gets a
    placeholder for each.
    """

    def __init__(
        self,
        tokenizer: Any,
        messages: Sequence[Message],
        image_token_id: int | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        """Takes and raises what `encode_chat` does, before a template is run."""
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template; leave chat off for a base model")
        self._tokenizer = tokenizer
        self._image_token_id = image_token_id
        self._borders = border_tokens(tokenizer)
        self._control = set(control_tokens(tokenizer).values())
        if image_token_id is not None:
            self._control.add(tokenizer.convert_ids_to_tokens(image_token_id))
        check_template_variables({} if template_variables is None else template_variables)
        self._variables = dict(template_variables or {})
        self._check_variables()
        contents = [_runs(message) for message in _checked(messages)]
        # No message can contain the marker, because it is a hash of all messages. It is not random, so that every
        # process writes the same text.
        digest = hashlib.blake2b(digest_size=8)
        for run in itertools.chain.from_iterable(contents):
            digest.update(run.encode("utf-8", "surrogatepass") if isinstance(run, str) else b"\0")
        self._marker = f"\ue000{int.from_bytes(digest.digest(), 'big')}\ue001"
        self._placeholder = re.compile(f"{self._marker}(\\d+)\ue001")
        self._held: list[Any] = []
        """What the numbered placeholders stand for."""
        self.begin, self.end = self._hold(_Literal("")), self._hold(_Literal(""))
        """Placeholders of nothing around the last message, where `write` is asked for them."""
        self._seen: list[list[InputImage]] = []
        """Of each message, its images in place of image tokens."""
        self._turns = [self._turn(m["role"], runs) for m, runs in zip(messages, contents, strict=True)]
        self._ids: dict[_Piece, list[int]] = {}
        """Of each piece of text that was read."""

    def write(self, num_messages: int, add_generation_prompt: bool, is_marked: bool = False) -> str:
        """The first messages as the template writes them, with placeholders.

        is_marked: put `begin` and `end` around the text of the last of them, which is the assistant's.
        """
        turns = self._turns[:num_messages]
        if is_marked:
            [*turns, last] = turns
            text = f"{self.begin}{self.text(num_messages - 1)}{self.end}"
            content = text if isinstance(last["content"], str) else [{"type": "text", "text": text}]
            turns.append({**last, "content": content})
        return render(
            self._tokenizer,
            turns,
            add_generation_prompt=add_generation_prompt,
            template_variables=self._variables,
        )

    def text(self, number: int) -> str:
        """What the template gets of the assistant's message of that number, with placeholders."""
        content = self._turns[number]["content"]
        return content if isinstance(content, str) else content[0]["text"]

    def read(self, written: str, num_messages: int) -> list[list[int] | Any]:
        """Token ids and images of what `write` has written of so many messages.

        All pieces of text go through the tokenizer in one call, each distinct piece once.
        """
        parts: list[list[int] | Any] = []
        seen = list(itertools.chain.from_iterable(self._seen[:num_messages]))
        if self._image_token_id is not None:
            parts += self._missing_bos(written)
        pieces = list(self._pieces(written))
        self._tokenize([piece for piece in pieces if isinstance(piece, _Piece)])
        num_places = 0
        for piece in pieces:
            if not isinstance(piece, _Piece):
                parts.append(piece)
                continue
            for ids in self._runs_of(self._ids[piece]):
                if ids[0] == self._image_token_id:
                    parts += seen[num_places : num_places + len(ids)]
                    num_places += len(ids)
                elif parts and isinstance(parts[-1], list):
                    parts[-1].extend(ids)
                else:
                    parts.append(list(ids))
        if num_places != len(seen):
            raise ValueError(
                f"the chat template writes {num_places} image tokens for {len(seen)} images of a conversation"
            )
        return parts

    def read_more(self, written: str) -> list[list[int] | Any]:
        """The same of text that goes on from other text, and in which no image is shown."""
        pieces = list(self._pieces(written))
        self._tokenize([piece for piece in pieces if isinstance(piece, _Piece)])
        return [list(self._ids[piece]) if isinstance(piece, _Piece) else piece for piece in pieces]

    def _check_variables(self) -> None:
        for name, value in self._variables.items():
            spelled = find_tokens(json.dumps(value, ensure_ascii=False), self._control)
            if spelled is not None:
                raise ValueError(
                    f"template_variables.{name} holds the control token {spelled[0]!r}, which only the template may "
                    "write; leave it out"
                )

    def _turn(self, role: str, runs: Sequence[str | list[Any]]) -> dict[str, Any]:
        """A message as the template gets it."""
        self._seen.append([])
        if self._image_token_id is not None and role != "assistant":
            return {"role": role, "content": self._shown(runs)}
        text = "".join(self._protect(run) if isinstance(run, str) else "".join(map(self._hold, run)) for run in runs)
        return {"role": role, "content": text if self._image_token_id is None else [{"type": "text", "text": text}]}

    def _shown(self, runs: Sequence[str | list[Any]]) -> list[dict[str, str]]:
        """The content of a message with images that are seen."""
        texts = [run for run in runs if isinstance(run, str)]
        # Templates may move images away from between two texts, in which nobody shall spell a control token then
        num_literal = sum(map(self._num_spelled, texts))
        border = self._hold(_Literal("")) if self._num_spelled("".join(texts)) > num_literal else ""
        content: list[dict[str, str]] = []
        for run in runs:
            if isinstance(run, str):
                content.append({"type": "text", "text": border + self._protect(run)})
            else:
                self._seen[-1] += map(InputImage, run)
                content += [{"type": "image"}] * len(run)
        return content

    def _num_spelled(self, text: str) -> int:
        spelled = find_tokens(text, self._control)
        return 0 if spelled is None else len(spelled.re.findall(text))

    def _protect(self, text: str) -> str:
        """`text` with the control tokens in it held back."""
        spelled = find_tokens(text, self._control)
        if spelled is None:
            return text
        return re.sub(f"(?:{spelled.re.pattern})+", lambda match: self._hold(_Literal(match[0])), text)

    def _hold(self, part: Any) -> str:
        self._held.append(part)
        return f"{self._marker}{len(self._held) - 1}\ue001"

    def _missing_bos(self, written: str) -> list[list[int]]:
        bos = self._tokenizer.bos_token
        if not bos or written.startswith(bos):
            return []
        [prefix] = token_ids(self._tokenizer, [""], control_tokens=True, add_special_tokens=True)
        return [ids] if (ids := [i for i in prefix if i == self._tokenizer.bos_token_id]) else []

    def _pieces(self, written: str) -> "Iterator[_Piece | Any]":
        """Pieces of text, and the images between them.

        Text of messages that lies between two spelled control tokens goes with them, so the number of pieces does not
        depend on how many of them a message has.
        """
        literal: list[str] = []
        control = [token for token in self._control if token in written]
        for i, part in enumerate(self._placeholder.split(written)):
            held = self._held[int(part)] if i % 2 else None
            if isinstance(held, _Literal) and held:
                literal.append(held)
            elif not i % 2 and literal and find_tokens(part, control) is None:
                literal.append(part)
            else:
                if literal:
                    yield _Piece("".join(literal), False)
                    literal = []
                if i % 2 and not isinstance(held, _Literal):
                    yield held
                elif not i % 2:
                    yield from (_Piece(piece, True) for piece in self._split(part))
        if literal:
            yield _Piece("".join(literal), False)

    def _split(self, text: str) -> list[str]:
        """`text` cut before each of its control tokens: much of a conversation is the same up to each of its turns."""
        first = find_tokens(text, self._borders)
        starts = [] if first is None else [match.start() for match in first.re.finditer(text)]
        cuts = [0, *starts, len(text)]
        return [text[begin:end] for begin, end in itertools.pairwise(cuts) if begin < end]

    def _runs_of(self, ids: list[int]) -> list[list[int]]:
        """Runs of image tokens, apart from the others. The ids are split and not the text, since some tokenizers treat
        the text after a control token differently."""
        if self._image_token_id not in ids:
            return [ids] if ids else []
        return [list(run) for _, run in itertools.groupby(ids, key=lambda i: i == self._image_token_id)]

    def _tokenize(self, pieces: "Sequence[_Piece]") -> None:
        for has_control in (True, False):
            new = list(dict.fromkeys(p for p in pieces if p.has_control == has_control and p not in self._ids))
            ids = token_ids(self._tokenizer, [piece.text for piece in new], control_tokens=has_control)
            self._ids |= zip(new, ids, strict=True)


class _Piece(NamedTuple):
    """Text for the tokenizer."""

    text: str
    has_control: bool
    """Whether the template wrote it, control tokens included. Otherwise those in it were spelled by somebody."""


class _Literal(str):
    """A control token that somebody spelled in a message; "" only keeps what is before and after it apart."""


def _checked(messages: Any) -> Sequence[Message]:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages are {messages!r:.80}; give a list of at least one {_MESSAGE_EXPECTED}")
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES or "content" not in message:
            raise ValueError(f"a message is {message!r:.80}; it must be a {_MESSAGE_EXPECTED}")
    return messages


def _runs(message: Message) -> list[str | list[Any]]:
    """Texts and runs of images of a message. Texts side by side are one: a control token may be spelled across them."""
    content = message["content"]
    parts = [content] if isinstance(content, str) or not isinstance(content, Sequence) else content
    return [
        "".join(run) if is_text else list(run)
        for is_text, run in itertools.groupby(map(_plain, parts), key=lambda part: isinstance(part, str))
    ]


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
