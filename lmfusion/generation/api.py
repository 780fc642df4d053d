"""Functions behind `LMFusion.generate`, `stream`, `draw` and `caption`: they run an engine for a list of prompts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lmfusion.generation.engine import Engine
from lmfusion.generation.events import Done, Event, ImageEnd, TextDelta
from lmfusion.generation.options import GenerationOptions, Limits
from lmfusion.generation.prompt import Prompt, PromptLike, encode_prompt
from lmfusion.generation.request import Request
from lmfusion.images.preprocessing import ImageSource

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion


@dataclass(frozen=True)
class Answer:
    """The answer to a prompt. `str(answer)` is its text."""

    parts: tuple[str | Image.Image, ...]
    """Texts and images in order."""
    finish_reason: str
    """"stop" or "length", as `events.Done` has it."""
    num_prompt_tokens: int
    num_new_tokens: int

    @property
    def text(self) -> str:
        """All texts, one after the other."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[Image.Image]:
        return [part for part in self.parts if not isinstance(part, str)]

    def __str__(self) -> str:
        return self.text


def stream_answer(model: "LMFusion", prompt: PromptLike, *, chat: bool = False, **options: Any) -> Iterator[Event]:
    """Events of one answer, as they happen, up to Done. Closing the iterator cancels the answer.

    prompt, chat: see `encode_prompt`. options: fields of `GenerationOptions`. Errors in them are raised at once, not at
    the first event.

    Raises ValueError for unknown options, values out of range, and what `encode_prompt` and `Engine.submit` refuse.
    """
    given = options_of(options)
    request = EngineRequest(encode_prompt(model, prompt, chat, given.template_variables), given)
    engine = engine_for(model, [request], batch_size=1)
    request_id = engine.submit(request.prompt, request.options)

    def events() -> Iterator[Event]:
        with evaluating(model):
            try:
                while engine.has_work:
                    for _, event in engine.step():
                        yield _without_error(event)
            finally:
                engine.cancel(request_id)

    return events()


def generate_answers(
    model: "LMFusion", prompts: Sequence[PromptLike], *, chat: bool = False, batch_size: int = 8, **options: Any
) -> list[Answer]:
    """An answer to each of `prompts`, up to `batch_size` at a time, as `stream_answer` gives them.

    Random numbers are keyed by (seed, index of the prompt), so batch_size does not change an answer.

    Raises what `stream_answer` raises, before anything is computed, and ValueError for an empty list.
    """
    given = options_of(options)
    check_list(prompts, "prompts", batch_size)
    encoded = [encode_prompt(model, prompt, chat, given.template_variables) for prompt in prompts]
    return _run(model, encoded, given, batch_size)


def draw_images(
    model: "LMFusion", prompts: Sequence[PromptLike], *, batch_size: int = 8, **options: Any
) -> list[Image.Image]:
    """One image for each prompt: a caption, or a list of texts and images that the new image follows, as in edits.

    options: those of images in `GenerationOptions`. Noise is keyed by (seed, index of the prompt), so batch_size does
    not change an image.

    Raises ValueError for an empty list or prompt, and what `generate_answers` raises.
    """
    fixed = ("draw_first", "max_images", "min_images", "max_new_tokens")
    _refuse(options, fixed, "draw generates an image and no text")
    _refuse(options, ("template_variables",), "draw takes captions, not conversations")
    given = options_of({"draw_first": True, "max_images": 1, "max_new_tokens": 0, **options})
    check_list(prompts, "prompts", batch_size)
    encoded = [encode_prompt(model, [prompt] if isinstance(prompt, str) else prompt) for prompt in prompts]
    return [answer.images[0] for answer in _run(model, encoded, given, batch_size)]


def caption_images(
    model: "LMFusion",
    images: Sequence[ImageSource],
    *,
    prompt: str = "",
    max_new_tokens: int = 32,
    batch_size: int = 8,
    **options: Any,
) -> list[str]:
    """A caption of each image, up to eos or `max_new_tokens`.

    images: files, Pillow images or arrays; cropped and resized to the codec's size, and read without noise. prompt: how
    every caption begins; it is not part of the answer. options: those of text in `GenerationOptions`. Random numbers
    are keyed by (seed, index of the image).

    Raises ValueError for an empty list, a damaged, huge or unknown image, and what `generate_answers` raises; OSError
    for a file that cannot be opened.
    """
    _refuse(options, ("draw_first", "max_images", "min_images"), "caption generates text and no image")
    _refuse(options, ("template_variables",), "caption takes images, not conversations")
    given = options_of({"max_new_tokens": max_new_tokens, **options})
    check_list(images, "images", batch_size)
    words = [prompt] if prompt.strip() else []
    encoded = [
        encode_prompt(model, [image if isinstance(image, (Image.Image, np.ndarray)) else Path(image), *words])
        for image in images
    ]
    return [answer.text.strip() for answer in _run(model, encoded, given, batch_size)]


@dataclass(frozen=True)
class EngineRequest:
    """An encoded prompt with its options, ready to be submitted to an engine."""

    prompt: Prompt
    options: GenerationOptions
    index: int = 0
    """With the seed, the key of the random numbers."""


def engine_for(model: "LMFusion", requests: Sequence[EngineRequest], batch_size: int) -> Engine:
    """An engine with as many cache slots as any `batch_size` of `requests` may need at a time.

    Raises ValueError for a request beyond the limits, or one that the model cannot answer.
    """
    for request in requests:  # before memory is allocated for a request beyond them
        Limits().check(request.options, request.prompt.num_images)
    num_slots = [sum(Request(model, 0, r.prompt, r.options, r.index).slot_counts()) for r in requests]
    return Engine(model, num_slots=sum(sorted(num_slots, reverse=True)[:batch_size]), max_batch=batch_size)


def options_of(options: dict[str, Any]) -> GenerationOptions:
    """`GenerationOptions` from keyword arguments. Raises ValueError for an unknown name."""
    known = [item.name for item in fields(GenerationOptions)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"an option must be one of {', '.join(known)}, got {unknown[0]!r}")
    return GenerationOptions(**options)


def _refuse(options: dict[str, Any], names: Sequence[str], why: str) -> None:
    for name in names:
        if name in options:
            raise ValueError(f"{why}; leave out {name}, or use generate")


def check_list(items: Any, name: str, batch_size: int) -> None:
    """Raise ValueError unless `items` is a list that is not empty, and batch_size at least 1."""
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise ValueError(f"{name} must be a list, also for a single one, got {items!r:.80}")
    if len(items) == 0:
        raise ValueError(f"{name} must not be empty; give at least one")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


@contextmanager
def evaluating(model: "LMFusion") -> Iterator[None]:
    """Put the model into evaluation mode, and restore its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _run(model: "LMFusion", prompts: Sequence[Prompt], options: GenerationOptions, batch_size: int) -> list[Answer]:
    requests = [EngineRequest(prompt, options, i) for i, prompt in enumerate(prompts)]
    engine = engine_for(model, requests, batch_size)
    position = {engine.submit(request.prompt, options, index=request.index): request.index for request in requests}
    collectors = [_Collector() for _ in prompts]
    with evaluating(model):
        while engine.has_work:
            for request_id, event in engine.step():
                collectors[position[request_id]].add(_without_error(event))
    return [collector.answer() for collector in collectors]


def _without_error(event: Event) -> Event:
    """The event. Raises the exception that ended a request."""
    if isinstance(event, Done) and event.exception is not None:
        raise event.exception
    return event


class _Collector:
    """Collects the events of one answer."""

    def __init__(self) -> None:
        self._parts: list[str | Image.Image] = []
        self._done: Done | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, TextDelta):
            if self._parts and isinstance(self._parts[-1], str):
                self._parts[-1] += event.text
            else:
                self._parts.append(event.text)
        elif isinstance(event, ImageEnd):
            self._parts.append(event.image)
        elif isinstance(event, Done):
            self._done = event

    def answer(self) -> Answer:
        done = self._done
        assert done is not None
        return Answer(tuple(self._parts), done.finish_reason, done.num_prompt_tokens, done.num_new_tokens)
