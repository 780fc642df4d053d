"""Splits conversations into what is read and what is learned: each answer follows the prompt generation would write.

<|im_start|>user  Draw a cat.<|im_end|>  <|im_start|>assistant  Here is a cat: BOI image EOI I drew a cat.<|im_end|>
                                                                ^ said, up to the token that ends the turn       ^
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmfusion.data.samples import Message, Utterance
from lmfusion.text.chat import Chat, InputImage
from lmfusion.text.tokenization import control_tokens

MAX_ANSWERS = 256
"""Answers of one conversation that are used; the rest of it is dropped. No row is long enough for more."""


def transcribe(
    tokenizer: Any,
    messages: Sequence[Message],
    image_token_id: int | None = None,
    template_variables: Mapping[str, Any] | None = None,
) -> tuple[Utterance, ...]:
    """The conversation as one document in token ids, images in their places, each with whether the assistant says it.

    The document is what generation reads before the last answer, the answer, and what the template closes it with. An
    answer is said up to the token that ends its turn. It begins where the prompt ends: white space that the template
    puts before it is part of it, words of the template that no prompt has (an empty think block) are left out.

    An earlier answer is said, too, where the document begins with what generation would have read and written then.
    Templates that write it otherwise later on (without its thoughts) leave it as something that is read. So is an
    answer that comes before any other message, which generation never writes.

    image_token_id, template_variables: as `encode_chat` takes them.

    Raises ValueError where the assistant says nothing, and as `lmfusion.text.chat.encode_chat` does.
    """
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"][:MAX_ANSWERS]
    if not places and messages:
        raise ValueError("the assistant says nothing in this conversation; there is nothing to learn from it")
    kept = [{**message, "content": list(message["content"])} for message in messages[: max(places, default=0) + 1]]
    chat = Chat(tokenizer, kept, image_token_id, template_variables)
    control_ids = set(control_tokens(tokenizer))
    images = _Images()
    answers: list[_Answer] = []
    refused: ValueError | None = None
    for i in places:
        try:
            answer = _answer(chat, i, control_ids, images) if i else None
        except ValueError as error:  # some templates take no conversation that ends here
            refused = refused or error
        else:
            answers += [] if answer is None else [answer]
    if not answers:
        raise refused or ValueError(
            "this conversation has no answer that generation could write; begin it with a user message, and make sure "
            "that the chat template accepts it up to each answer"
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
    """Token ids and numbers of images: what is read before it, the answer, and what the template closes it with."""
    begin: int
    """Where it begins among them."""
    end: int
    """Behind the token that ends the turn."""


class _Images(list[Any]):
    """Images by number, which is below 0. One that comes again, in a later prompt, has the number it had."""

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
    """The answer that is message number `place`; None where the template hides what it makes of it."""
    prompt = chat.write(place, add_generation_prompt=True)
    answered = _answered(chat, prompt, place)
    if answered is None:
        return None
    text, closing = answered
    head = images.number(chat.read(prompt, place))
    items = images.number(chat.read(prompt + text + closing, place + 1))
    if items[: len(head)] != head:  # where the prompt's last words and the answer's first would be one token
        items = head + images.number(chat.read_more(text + closing))
    end = next((i + 1 for i in range(len(head), len(items)) if items[i] in control_ids), None)
    if end is None:  # words end the turn
        items = head + images.number(chat.read_more(text))
        end = len(items)
        items += images.number(chat.read_more(closing))
    return _Answer(items, len(head), end)


def _answered(chat: Chat, prompt: str, place: int) -> tuple[str, str] | None:
    """What follows a prompt: the answer, and what the template closes it with."""
    closed = chat.write(place + 1, add_generation_prompt=False)
    before, begins, rest = chat.write(place + 1, add_generation_prompt=False, is_marked=True).partition(chat.begin)
    _, ends, closing = (rest if begins else before).partition(chat.end)  # templates may cut contents into pieces
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
    # The prompt has words that are not in a closed turn, such as the beginning of thoughts; answers may begin with them
    num_common = next((i for i, (ours, theirs) in enumerate(zip(prompt, closed, strict=False)) if ours != theirs), 0)
    return chat.text(place).removeprefix(prompt[num_common:]), closing


def _utterances(items: list[int], is_target: list[bool], ends: set[int], images: _Images) -> Iterator[Utterance]:
    """Runs of tokens, and images, that are said or not; what ends an answer is a run of its own."""

    def kind(i: int) -> tuple[bool, bool, int]:
        return is_target[i], is_target[i] and i in ends, i if items[i] < 0 else -1

    for (said, _, image), run in itertools.groupby(range(len(items)), kind):
        ids = [items[i] for i in run]
        yield Utterance(images[-1 - ids[0]] if image >= 0 else np.array(ids, np.int32), said)
