"""Does the model draw when it is asked to, and only then? Conversations in greedy decoding, counted."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from lmfusion.model.modeling import LMFusion
from lmfusion.synthetic.digit_classifier import DigitClassifier
from lmfusion.synthetic.digits import NAMES, REQUESTS, answer_opening, name_with_article

UNSEEN_REQUESTS = (
    "Please draw {}.",
    "draw {}",
    "Could you please draw {} for me?",
    "I would like a picture of {}.",
)
"""Words in which no digit is asked for in training."""
QUESTIONS = (
    "What is the capital of France?",
    "Hello!",
    "What is two plus two?",
    "Who wrote Hamlet?",
    "Name three colors.",
    "Tell me about the number seven.",
    "What is a prime number?",
    "How many days does a week have?",
)
"""Nothing to draw here."""
MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Reply:
    """What the model answered to a request for a digit."""

    request: str
    digit: int
    before: str
    """Text up to the first image."""
    image: Image.Image | None
    after: str
    """Text after it."""
    read_as: int | None
    """What the judge takes the image for."""

    @property
    def is_right(self) -> bool:
        """Text, an image that the judge reads as asked, and text that names this digit and no other."""
        named = [name for name in NAMES if re.search(rf"\b{name}\b", self.after)]
        return bool(self.before.strip()) and self.read_as == self.digit and named == [NAMES[self.digit]]


def ask_for_digits(model: LMFusion, judge: DigitClassifier, requests: Sequence[str], **sampling: Any) -> list[Reply]:
    """The answers to every one of `requests` ({} is the digit) for all ten digits; an image is never forced."""
    asked = [(request.format(name_with_article(digit)), digit) for request in requests for digit in range(10)]
    prompts = [prompt for prompt, _ in asked]
    answers = model.generate(prompts, chat=True, max_images=1, max_new_tokens=MAX_NEW_TOKENS, **sampling)
    replies = []
    for (prompt, digit), answer in zip(asked, answers, strict=True):
        place = next((i for i, part in enumerate(answer.parts) if not isinstance(part, str)), len(answer.parts))
        before, after = ("".join(map(str, parts)) for parts in (answer.parts[:place], answer.parts[place + 1 :]))
        image = answer.images[0] if answer.images else None
        replies.append(Reply(prompt, digit, before, image, after, judge.classify([image])[0] if image else None))
    return replies


def openings_as_taught(model: LMFusion) -> float:
    """For how many of the requests of training the base LLM itself, without images, opens its answer as taught."""
    asked = [(request.format(name_with_article(digit)), digit) for request in REQUESTS for digit in range(10)]
    answers = model.generate([prompt for prompt, _ in asked], chat=True, max_new_tokens=8, batch_size=len(asked))
    taught = [str(answer).startswith(answer_opening(digit)) for answer, (_, digit) in zip(answers, asked, strict=True)]
    return sum(taught) / len(taught)


def answer_questions(model: LMFusion) -> list[tuple[str, str, bool]]:
    """To each of QUESTIONS the answer where an image is allowed, and whether it came without one.

    Every word up to an image is the base LLM's.
    """
    options: dict[str, Any] = {"chat": True, "max_new_tokens": MAX_NEW_TOKENS, "batch_size": len(QUESTIONS)}
    answers = model.generate(QUESTIONS, max_images=1, num_steps=1, **options)
    return [(question, str(answer), not answer.images) for question, answer in zip(QUESTIONS, answers, strict=True)]
