"""What does a conversation teach? The words and images of the assistant, where the chat template puts them.

<|im_start|>user  Draw a cat.<|im_end|>  <|im_start|>assistant  Here is a cat: BOI image EOI I drew a cat.<|im_end|>
                                                                ^ said, up to the token that ends the turn       ^
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmfusion.chat import Seen, encode_chat
from lmfusion.data.sources import Message, Utterance
from lmfusion.tokens import control_tokens

_BEGIN, _END = object(), object()  # where the assistant's words lie between those of the template


def transcribe(tokenizer: Any, messages: Sequence[Message], image_token_id: int | None = None) -> tuple[Utterance, ...]:
    """The conversation as one document in token ids, images in their places, each with whether the assistant says it.

    The token that ends the assistant's turn is the last thing it says; what the template writes besides is not said.
    Ids are those that generation reads and writes: tokens never reach over the border of a turn. image_token_id: as
    `encode_chat` takes it.

    Raises ValueError where the assistant says nothing, and as `lmfusion.chat.encode_chat` does.
    """
    turns: list[dict[str, Any]] = [{**message, "content": list(message["content"])} for message in messages]
    for turn in turns:
        if turn["role"] == "assistant":
            turn["content"] = [_BEGIN, *turn["content"], _END]
    control_ids = control_tokens(tokenizer)
    utterances: list[Utterance] = []

    def add(ids: list[int], is_said: bool) -> None:
        if ids:
            utterances.append(Utterance(np.array(ids, np.int32), is_said))

    is_said = has_ended = False
    for part in encode_chat(tokenizer, turns, add_generation_prompt=False, image_token_id=image_token_id):
        if part is _BEGIN:
            is_said = True
        elif part is _END:
            has_ended = True
        elif not isinstance(part, list):
            utterances.append(Utterance(part.image if isinstance(part, Seen) else part, is_said))
        elif has_ended:
            num_said = next((i + 1 for i, token_id in enumerate(part) if token_id in control_ids), 0)
            add(part[:num_said], True)
            add(part[num_said:], False)
            is_said = has_ended = False
        else:
            add(part, is_said)
    if not any(is_said for _, is_said in utterances):
        raise ValueError("the assistant says nothing in this conversation; there is nothing to learn from it")
    return tuple(utterances)
