"""Splits conversations into context and targets: each answer follows the prompt that generation would write.

<|im_start|>user  Draw a cat.<|im_end|>  <|im_start|>assistant  Here is a cat: BOI image EOI I drew a cat.<|im_end|>
                                                                ^ targets, up to the token that ends the turn    ^
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmfusion.data.samples import Message, Utterance
from lmfusion.text.chat import Chat, InputImage
from lmfusion.text.tokenization import control_tokens

MAX_ANSWERS = 256
"""Answers of one conversation that are used; the rest of it is dropped. No sequence is long enough for more."""


def transcribe(
    tokenizer: Any,
    messages: Sequence[Message],
    image_token_id: int | None = None,
    template_variables: Mapping[str, Any] | None = None,
) -> tuple[Utterance, ...]:
    """The conversation as one document of token ids and images, and which of them are targets.

    The document is the prompt of the last answer as generation writes it, the answer, and the template's end of the
    turn. An answer is a target up to the token that ends its turn. It begins where the prompt ends: white space that
    the template puts before it belongs to it, and words of the template that no prompt has (an empty think block) are
    left out.

    An earlier answer is a target, too, if the document begins with its prompt and the answer as generation would have
    written them then. Where the template writes it differently later on (without its thoughts), it is context. So is an
    answer before any other message, which generation never writes.

    image_token_id, template_variables: as `encode_chat` takes them.

    Raises ValueError where the assistant has no message, and as `lmfusion.text.chat.encode_chat` does.
    """
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"][:MAX_ANSWERS]
    if not places and messages:
        raise ValueError("a conversation must have a message of the assistant to learn from")
    kept = [{**message, "content": list(message["content"])} for message in messages[: max(places, default=0) + 1]]
    chat = Chat(tokenizer, kept, image_token_id, template_variables)
    control_ids = set(control_tokens(tokenizer))
    images = _Images()
    answers: list[_Answer] = []
    refused: ValueError | None = None
    for i in places:
        try:
            answer = _answer(chat, i, control_ids, images) if i else None
        except ValueError as error:  # some templates reject a conversation that ends here
            refused = refused or error
        else:
            answers += [] if answer is None else [answer]
    if not answers:
        raise refused or ValueError(
            "a conversation must have an answer that generation could write; begin it with a user message, and make "
            "sure that the chat template accepts it up to each answer"
        )
    last = answers[-1]
    is_target = [False] * len(last.items)
    for answer in answers:
        if answer.items[: answer.end] == last.items[: answer.end]:
            is_target[answer.begin : answer.end] = [True] * (answer.end - answer.begin)
    ends = {answer.end - 1 for answer in answers}
    return tuple(_utterances(last.items, is_target, ends, images))


class _Answer(NamedTuple):
    """An answer as generation writes it."""

    items: list[int]
    """Token ids and numbers of images: the prompt, the answer, and the template's end of the turn."""
    begin: int
    """Where it begins among them."""
    end: int
    """After the token that ends the turn."""


class _Images(list[Any]):
    """Images by number, which is below 0. An image that comes again, in a later prompt, keeps its number."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}

    def number(self, parts: Sequence[list[int] | Any]) -> list[int]:
        """Token ids of `parts` and numbers of the images among them."""
        items: list[int] = []
        for part in parts:
            if isinstance(part, list):
                items += part
                continue
            image = part.image if isinstance(part, InputImage) else part
            if id(image) not in self._numbers:
                self.append(image)
                self._numbers[id(image)] = -len(self)
            items.append(self._numbers[id(image)])
        return items


def _answer(chat: Chat, place: int, control_ids: set[int], images: _Images) -> _Answer | None:
    """The answer that is message number `place`; None if it cannot be found in what the template writes."""
    prompt = chat.write(place, add_generation_prompt=True)
    answered = _answered(chat, prompt, place)
    if answered is None:
        return None
    text, closing = answered
    head = images.number(chat.read(prompt, place))
    items = images.number(chat.read(prompt + text + closing, place + 1))
    if items[: len(head)] != head:  # the prompt's last characters and the answer's first would be one token
        items = head + images.number(chat.read_more(text + closing))
    end = next((i + 1 for i in range(len(head), len(items)) if items[i] in control_ids), None)
    if end is None:  # the template ends the turn with text, not with a control token
        items = head + images.number(chat.read_more(text))
        end = len(items)
        items += images.number(chat.read_more(closing))
    return _Answer(items, len(head), end)


def _answered(chat: Chat, prompt: str, place: int) -> tuple[str, str] | None:
    """The text after a prompt: the answer, and the template's end of the turn."""
    closed = chat.write(place + 1, add_generation_prompt=False)
    before, begins, rest = chat.write(place + 1, add_generation_prompt=False, is_marked=True).partition(chat.begin)
    _, ends, closing = (rest if begins else before).partition(chat.end)  # templates may split contents
    is_whole = bool(begins and ends)
    if closed.startswith(prompt):
        following = closed.removeprefix(prompt)
        opening = before.removeprefix(prompt) if is_whole and before.startswith(prompt) else ""
        if opening.strip():
            following = following.removeprefix(opening)
        if is_whole and following.endswith(closing):
            return following.removesuffix(closing), closing
        return following, ""
    if not ends:
        return None
    # The prompt has text that is not in a closed turn, such as the beginning of thoughts. Answers may begin with it.
    num_common = next((i for i, (ours, theirs) in enumerate(zip(prompt, closed, strict=False)) if ours != theirs), 0)
    return chat.text(place).removeprefix(prompt[num_common:]), closing


def _utterances(items: list[int], is_target: list[bool], ends: set[int], images: _Images) -> Iterator[Utterance]:
    """Runs of tokens, and images, that are targets or not. The token that ends an answer is a run of its own."""

    def kind(i: int) -> tuple[bool, bool, int]:
        return is_target[i], is_target[i] and i in ends, i if items[i] < 0 else -1

    for (target, _, image), run in itertools.groupby(range(len(items)), kind):
        ids = [items[i] for i in run]
        yield Utterance(images[-1 - ids[0]] if image >= 0 else np.array(ids, np.int32), target)
