"""Chat evaluation of the demo: whether the model generates an image if, and only if, it is asked for one."""

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
"""Requests in words that are not in the training data."""
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
"""Questions that need no image."""
MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Reply:
    """The model's answer to a request for a digit."""

    request: str
    digit: int
    before: str
    """Text up to the first image."""
    image: Image.Image | None
    after: str
    """Text after it."""
    read_as: int | None
    """The digit that the classifier reads in the image."""

    @property
    def is_right(self) -> bool:
        """Whether there is text, an image that is read as the digit, and text that names this digit and no other."""
        named = [name for name in NAMES if re.search(rf"\b{name}\b", self.after)]
        return bool(self.before.strip()) and self.read_as == self.digit and named == [NAMES[self.digit]]


def request_digits(
    model: LMFusion, classifier: DigitClassifier, requests: Sequence[str], **sampling: Any
) -> list[Reply]:
    """The answers to each of `requests` ({} is the digit) for all ten digits. The model decides about images."""
    prompted = [(request.format(name_with_article(digit)), digit) for request in requests for digit in range(10)]
    prompts = [prompt for prompt, _ in prompted]
    answers = model.generate(prompts, chat=True, max_images=1, max_new_tokens=MAX_NEW_TOKENS, **sampling)
    replies = []
    for (prompt, digit), answer in zip(prompted, answers, strict=True):
        first = next((i for i, part in enumerate(answer.parts) if not isinstance(part, str)), len(answer.parts))
        before, after = ("".join(map(str, parts)) for parts in (answer.parts[:first], answer.parts[first + 1 :]))
        image = answer.images[0] if answer.images else None
        replies.append(Reply(prompt, digit, before, image, after, classifier.classify([image])[0] if image else None))
    return replies


def openings_as_taught(model: LMFusion) -> float:
    """The share of training requests that the base LLM, without images, begins to answer as the training data do."""
    prompted = [(request.format(name_with_article(digit)), digit) for request in REQUESTS for digit in range(10)]
    answers = model.generate([prompt for prompt, _ in prompted], chat=True, max_new_tokens=8, batch_size=len(prompted))
    as_taught = [
        str(answer).startswith(answer_opening(digit)) for answer, (_, digit) in zip(answers, prompted, strict=True)
    ]
    return sum(as_taught) / len(as_taught)


def answer_questions(model: LMFusion) -> list[tuple[str, str, bool]]:
    """Each of QUESTIONS with its answer if images are allowed, and whether the answer has none.

    Every token before an image is the base LLM's.
    """
    options: dict[str, Any] = {"chat": True, "max_new_tokens": MAX_NEW_TOKENS, "batch_size": len(QUESTIONS)}
    answers = model.generate(QUESTIONS, max_images=1, num_steps=1, **options)
    return [(question, str(answer), not answer.images) for question, answer in zip(QUESTIONS, answers, strict=True)]
