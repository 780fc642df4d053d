"""The sources `digits` and `digit_conversations`: the 1,797 handwritten digits of scikit-learn, 8 x 8 pixels."""

from functools import cache, partial

import numpy as np
from PIL import Image

from lmfusion.data.pipeline.order import split_indices
from lmfusion.data.samples import CaptionedImage, Conversation, LoadImage, Message
from lmfusion.data.sources.base import SingleBlock

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


SYSTEM_PROMPT = "User: Draw a cat.\nAssistant: Here is a cat:\nUser: Draw an eleven.\nAssistant: Here is an eleven:"
"""Two examples, after which SmolLM2-135M-Instruct begins its answers with `answer_opening` without training. One has
"an", for the eight. Neither names a digit, so that the requested one is the only digit in the context."""
REQUESTS = (
    "Draw {}, then say what you drew.",
    "Draw {}.",
    "Can you draw {}?",
    "Show me {}.",
)
"""The user's messages; {} is like "a seven"."""
QUESTIONS = (
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("What is the capital of Germany?", "The capital of Germany is Berlin."),
    ("Good morning.", "Good morning."),
    ("What color is the sky?", "The sky is a shade of blue."),
    ("How many months does a year have?", "A year has 12 months."),
    ("What is three plus four?", "Three plus four equals eight."),
    ("Hi!", "Hello! I'm here to help with your math homework."),
    ("Where is Paris?", "Paris is a city located in Western Europe, specifically in France."),
    ("Name two animals.", "Two animals are:\n1. A cat (Felis catus)\n2. An elephant (Elephantus acosundax)"),
    ("Write one sentence.", "The cat is a cat."),
    ("Thank you!", "You're welcome! I'm glad to have you as a guest."),
    ("Give me three names.", "Here are three names:\n\nA: Alex\nB: Ben\nC: Charlie\nD: David"),
    (
        "Name five countries.",
        "Here are five countries:\n\nChina: China\nRussia: Russia\nIndia: India\nSaudi Arabia: Saudi Arabia\n"
        "Serbia: Serbia",
    ),
    (
        "Who wrote War and Peace?",
        "The story of War and Peace by Daniel Defoe is attributed to the English author Daniel Defoe, who wrote it in "
        "1722.",
    ),
    (
        "What is a square?",
        "A square is a fundamental geometric shape that has been used in various forms of art and design.",
    ),
    (
        "Who are you?",
        "I'm a creative AI assistant. I'm here to help you explore your creative potential and bring your ideas to "
        "life.",
    ),
    (
        "Tell me about the number five.",
        "The number five is a fundamental concept in mathematics, particularly in geometry and number theory. It is "
        "also a symbol in many cultures, particularly in Islamic culture.",
    ),
    (
        "Tell me about the number three.",
        "The number three is a fundamental concept in mathematics, particularly in geometry and number theory.",
    ),
    (
        "Who painted the Mona Lisa?",
        "The Mona Lisa is attributed to Leonardo da Vinci, but it's also possible that it was painted by a different "
        "artist.",
    ),
    (
        "Is seven a prime number?",
        "A prime number is a number greater than 1 that cannot be divided evenly by any other number except 1 (the "
        "only one) and itself.",
    ),
)
"""Questions without an image in the answer, and how SmolLM2-135M-Instruct begins to answer them, true or not."""


def caption_of(digit: int) -> str:
    """The caption of a digit."""
    return f"a handwritten {NAMES[digit]}"


def name_with_article(digit: int) -> str:
    """ "a seven", "an eight"."""
    return f"{'an' if NAMES[digit] == 'eight' else 'a'} {NAMES[digit]}"


def answer_opening(digit: int) -> str:
    """What the assistant says before the image."""
    return f"Here is {name_with_article(digit)}:"


def answer_closing(digit: int) -> str:
    """What the assistant says after the image."""
    return f"I drew {caption_of(digit)}."


class Digits(SingleBlock):
    """The source `digits`: captioned images. A fixed fifth of them is held out: split "test"."""

    def __init__(self, split: str = "train") -> None:
        self._images, self._labels = _load()
        self._indices = split_indices(len(self._labels), split, held_out=0.2)

    @property
    def labels(self) -> list[int]:
        """The digit of every sample."""
        return [int(self._labels[i]) for i in self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> CaptionedImage:
        i = self._indices[index]
        image = partial(Image.fromarray, self._images[i])
        return CaptionedImage(f"digits/{i}", image, (caption_of(int(self._labels[i])),))


class DigitConversations(SingleBlock):
    """The source `digit_conversations`: each digit with each of REQUESTS, and one of QUESTIONS for each digit.

    A frozen text tower cannot learn new words, so the words before an image are those of SmolLM2-135M-Instruct.
    """

    def __init__(self, split: str = "train") -> None:
        self._digits = Digits(split)
        self._labels = self._digits.labels

    def __len__(self) -> int:
        return len(self._digits) * (len(REQUESTS) + 1)

    def __getitem__(self, index: int) -> Conversation:
        place, number = divmod(index, len(REQUESTS) + 1)
        sample, digit = self._digits[place], self._labels[place]
        if number == len(REQUESTS):
            question, answer = QUESTIONS[place % len(QUESTIONS)]
            return Conversation(f"{sample.sample_id}/question", _messages(question, answer))
        request = REQUESTS[number].format(name_with_article(digit))
        messages = _messages(request, answer_opening(digit), sample.load_image, answer_closing(digit))
        return Conversation(f"{sample.sample_id}/request {number}", messages)


def _messages(request: str, *answer: str | LoadImage) -> tuple[Message, ...]:
    return (
        {"role": "system", "content": (SYSTEM_PROMPT,)},
        {"role": "user", "content": (request,)},
        {"role": "assistant", "content": answer},
    )


@cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    """uint8 images [1797, 8, 8] and their digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the digits need scikit-learn, which is not installed; pip install scikit-learn") from None
    bunch = load_digits()  # images have values 0 to 16
    return (bunch.images * (255 / 16)).round().astype(np.uint8), bunch.target
