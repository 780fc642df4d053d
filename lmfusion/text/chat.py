"""Conversations of texts and images as one document: the tokenizer's chat template, images in their places.

A message is a dict {"role": "system" | "user" | "assistant", "content": ...}; content is a text, or a list of texts,
images, {"type": "text", "text": ...} and {"type": "image", "image": ...}, as in OpenAI's and transformers' chats. An
image may be any object; it is passed through as it is.

Only the template writes control tokens. A control token spelled in a message is text, and cannot end a turn.

The template of a vision-language model decides where its input images are placed: it gets contents as lists, and writes
the model's image token. Images of the assistant are generated, and keep their place among its words.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lmfusion.text.chat_template import check_template_variables, render
from lmfusion.text.tokenization import border_tokens, control_tokens, find_tokens, token_ids

ChatMessage = Mapping[str, Any]
ROLES = ("system", "user", "assistant")

_MESSAGE_EXPECTED = f'like {{"role": "user", "content": "Draw a cat."}} (roles: {", ".join(ROLES)})'


class InputImage(NamedTuple):
    """An input image of a vision-language model, in place of its image token."""

    image: Any


def encode_chat(
    tokenizer: Any,
    messages: Sequence[ChatMessage],
    add_generation_prompt: bool = True,
    image_token_id: int | None = None,
    template_variables: Mapping[str, Any] | None = None,
) -> list[list[int] | Any]:
    """Runs of token ids and the images between them, in their order; bos is among the ids where the template puts it.

    add_generation_prompt: end with the opening of the assistant's turn. Without it, the last message is closed like
    every other turn. image_token_id: of a vision-language model; images that are not the assistant's are then
    `InputImage`, and bos comes first even if the template does not write it: the ids are those of transformers'
    processor. template_variables: read by the template, see `lmfusion.text.chat_template`.

    Raises ValueError for invalid messages or variables, an empty conversation, a tokenizer without chat
    template, or a template that does not take the conversation.
    """
    chat = Chat(tokenizer, messages, image_token_id, template_variables)
    return chat.read(chat.write(len(messages), add_generation_prompt), len(messages))


class Chat:
    """A conversation that the template can write up to any of its messages.

    The template gets a numbered placeholder for each image, and for each control token that is spelled in a message.
    """

    def __init__(
        self,
        tokenizer: Any,
        messages: Sequence[ChatMessage],
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
        contents = [_runs(message) for message in _check_messages(messages)]
        # No message can contain the marker, because it is a hash of all messages. It is not random, so that every
        # process writes the same text.
        digest = hashlib.blake2b(digest_size=8)
        for run in itertools.chain.from_iterable(contents):
            digest.update(run.encode("utf-8", "surrogatepass") if isinstance(run, str) else b"\0")
        self._marker = f"\ue000{int.from_bytes(digest.digest(), 'big')}\ue001"
        self._placeholder_pattern = re.compile(f"{self._marker}(\\d+)\ue001")
        self._replaced: list[Any] = []
        """What the numbered placeholders stand for: images, and `_Verbatim` text."""
        self.begin, self.end = self._placeholder_for(_Verbatim("")), self._placeholder_for(_Verbatim(""))
        """Placeholders of empty text, which `write` puts around the last message with is_marked."""
        self._input_images: list[list[InputImage]] = []
        """Of each message, its images in place of image tokens."""
        self._turns = [self._turn(m["role"], runs) for m, runs in zip(messages, contents, strict=True)]
        self._ids: dict[_Piece, list[int]] = {}
        """Ids of each piece of text that has been tokenized."""

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
        """The text of the assistant's message of that number as the template gets it, with placeholders."""
        content = self._turns[number]["content"]
        return content if isinstance(content, str) else content[0]["text"]

    def read(self, written: str, num_messages: int) -> list[list[int] | Any]:
        """Token ids and images of what `write` has written of the first `num_messages` messages.

        All pieces of text go through the tokenizer in one call, each distinct piece once.
        """
        parts: list[list[int] | Any] = []
        input_images = list(itertools.chain.from_iterable(self._input_images[:num_messages]))
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
                    parts += input_images[num_places : num_places + len(ids)]
                    num_places += len(ids)
                elif parts and isinstance(parts[-1], list):
                    parts[-1].extend(ids)
                else:
                    parts.append(list(ids))
        if num_places != len(input_images):
            raise ValueError(
                "the chat template must write an image token for each of the conversation's "
                f"{len(input_images)} images, got {num_places}"
            )
        return parts

    def read_more(self, written: str) -> list[list[int] | Any]:
        """The same for text that continues other text and contains no input image."""
        pieces = list(self._pieces(written))
        self._tokenize([piece for piece in pieces if isinstance(piece, _Piece)])
        return [list(self._ids[piece]) if isinstance(piece, _Piece) else piece for piece in pieces]

    def _check_variables(self) -> None:
        for name, value in self._variables.items():
            spelled = find_tokens(json.dumps(value, ensure_ascii=False), self._control)
            if spelled is not None:
                raise ValueError(
                    f"template_variables.{name} must not hold a control token, which only the template may write, "
                    f"got {spelled[0]!r}; leave it out"
                )

    def _turn(self, role: str, runs: Sequence[str | list[Any]]) -> dict[str, Any]:
        """A message as the template gets it."""
        self._input_images.append([])
        if self._image_token_id is not None and role != "assistant":
            return {"role": role, "content": self._content_with_input_images(runs)}
        text = "".join(
            self._protect(run) if isinstance(run, str) else "".join(map(self._placeholder_for, run)) for run in runs
        )
        return {"role": role, "content": text if self._image_token_id is None else [{"type": "text", "text": text}]}

    def _content_with_input_images(self, runs: Sequence[str | list[Any]]) -> list[dict[str, str]]:
        """The content of a message with input images, as a list."""
        texts = [run for run in runs if isinstance(run, str)]
        # A template may move an image away from between two texts. The joined text must not spell a control token.
        num_spelled = sum(map(self._num_spelled, texts))
        border = self._placeholder_for(_Verbatim("")) if self._num_spelled("".join(texts)) > num_spelled else ""
        content: list[dict[str, str]] = []
        for run in runs:
            if isinstance(run, str):
                content.append({"type": "text", "text": border + self._protect(run)})
            else:
                self._input_images[-1] += map(InputImage, run)
                content += [{"type": "image"}] * len(run)
        return content

    def _num_spelled(self, text: str) -> int:
        spelled = find_tokens(text, self._control)
        return 0 if spelled is None else len(spelled.re.findall(text))

    def _protect(self, text: str) -> str:
        """`text` with placeholders for the control tokens in it."""
        spelled = find_tokens(text, self._control)
        if spelled is None:
            return text
        return re.sub(f"(?:{spelled.re.pattern})+", lambda match: self._placeholder_for(_Verbatim(match[0])), text)

    def _placeholder_for(self, part: Any) -> str:
        self._replaced.append(part)
        return f"{self._marker}{len(self._replaced) - 1}\ue001"

    def _missing_bos(self, written: str) -> list[list[int]]:
        bos = self._tokenizer.bos_token
        if not bos or written.startswith(bos):
            return []
        [prefix] = token_ids(self._tokenizer, [""], control_tokens=True, add_special_tokens=True)
        return [ids] if (ids := [i for i in prefix if i == self._tokenizer.bos_token_id]) else []

    def _pieces(self, written: str) -> "Iterator[_Piece | Any]":
        """Pieces of text, and the images between them.

        Text of a message between two spelled control tokens is in one piece with them, so that the number of pieces
        does not grow with the number of spelled control tokens.
        """
        verbatim: list[str] = []
        control = [token for token in self._control if token in written]
        for i, part in enumerate(self._placeholder_pattern.split(written)):
            replaced = self._replaced[int(part)] if i % 2 else None
            if isinstance(replaced, _Verbatim) and replaced:
                verbatim.append(replaced)
            elif not i % 2 and verbatim and find_tokens(part, control) is None:
                verbatim.append(part)
            else:
                if verbatim:
                    yield _Piece("".join(verbatim), False)
                    verbatim = []
                if i % 2 and not isinstance(replaced, _Verbatim):
                    yield replaced
                elif not i % 2:
                    yield from (_Piece(piece, True) for piece in self._split(part))
        if verbatim:
            yield _Piece("".join(verbatim), False)

    def _split(self, text: str) -> list[str]:
        """`text` cut before each of its control tokens, so that what a conversation repeats is tokenized once."""
        first = find_tokens(text, self._borders)
        starts = [] if first is None else [match.start() for match in first.re.finditer(text)]
        cuts = [0, *starts, len(text)]
        return [text[begin:end] for begin, end in itertools.pairwise(cuts) if begin < end]

    def _runs_of(self, ids: list[int]) -> list[list[int]]:
        """`ids` split into runs of image tokens and runs of others.

        The ids are split and not the text, since some tokenizers change the word after a control token.
        """
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
    """Whether control tokens in it count, as in text of the template. In text of a message they are spelled words."""


class _Verbatim(str):
    """A control token that is spelled in a message; "" only separates what is before and after it."""


def _check_messages(messages: Any) -> Sequence[ChatMessage]:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages must be a list of at least one message {_MESSAGE_EXPECTED}, got {messages!r:.80}")
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES or "content" not in message:
            raise ValueError(f"a message must be {_MESSAGE_EXPECTED}, got {message!r:.80}")
    return messages


def _runs(message: ChatMessage) -> list[str | list[Any]]:
    """Texts and runs of images of a message. Adjacent texts are one: a control token may be spelled across them."""
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
                'a part of a message must be {"type": "text", "text": ...} or {"type": "image", "image": ...}, got '
                f"{part!r:.80}"
            )
        return part[kind]
    return part
