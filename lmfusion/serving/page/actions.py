"""Answers a message of the page: reads its images, builds the prompt, and passes the worker's events to the session."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmfusion.generation.events import Event
from lmfusion.generation.prompt import PromptLike, encode_prompt
from lmfusion.images.preprocessing import decode_image, to_pil, to_tensor
from lmfusion.serving.page.session import Session, Sessions, Turn
from lmfusion.serving.page.uploads import MAX_UPLOAD_BYTES

if TYPE_CHECKING:
    from lmfusion.generation.options import GenerationOptions
    from lmfusion.generation.worker import EngineWorker
    from lmfusion.model.modeling import LMFusion

MAX_INPUT_SIDE = 2048
"""Pixels of the longer side of an image for a vision-language model. Larger images are scaled down."""
UPDATE_SECONDS = 0.04
"""Time between two updates of the page. Updates for each event of a fast model would flood the browser."""


class Actions:
    """What the page can do for its tabs.

    Args:
        worker: answers the prompts.
        model: the model of `worker`.
        folder: where the images of all tabs are stored.
    """

    def __init__(self, worker: "EngineWorker", model: "LMFusion", folder: Path) -> None:
        self.sessions = Sessions(folder)
        self._worker = worker
        self._model = model

    async def answer(
        self, session: Session, text: str, files: Sequence[str], options: "GenerationOptions", prompt_mode: str
    ) -> AsyncIterator[list[Event]]:
        """Answer a message in `session`: yield [] once the answer has started, then its events until it is done.

        Closing the iterator cancels the answer.

        Args:
            session: the tab's state, to which the message and the answer are added.
            text: the message.
            files: paths of its images.
            options: how to generate.
            prompt_mode: one of `lmfusion.serving.page.settings.PROMPT_MODES`.

        Raises:
            ValueError: for a message that cannot be answered; the session is unchanged.
            QueueFull, Stopped: as from `EngineWorker.submit`; the session is unchanged.
        """
        if session.is_busy:
            raise ValueError("only one answer at a time can be generated in a tab; wait for the current one or stop it")
        session.is_busy = True
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def on_event(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            question = await asyncio.to_thread(self._read, session, text, files)
            prompt_like = self._prompt_like(session, question, options, prompt_mode)
            prompt = await asyncio.to_thread(encode_prompt, self._model, prompt_like)
            session.stream = await asyncio.to_thread(self._worker.submit, prompt, options, on_event)
            if session.is_closed:  # while the worker accepted the request
                return
            answer = session.begin(question)
            yield []
            while not answer.is_finished:
                new = [await events.get()]
                while not events.empty():
                    new.append(events.get_nowait())
                if session.is_closed:
                    return
                await asyncio.to_thread(_add_events, session, answer, new)
                yield new
                await asyncio.sleep(UPDATE_SECONDS)
        finally:
            session.stop()
            session.stream = None
            session.is_busy = False

    def _prompt_like(
        self, session: Session, question: Turn, options: "GenerationOptions", prompt_mode: str
    ) -> PromptLike:
        messages = session.messages(question)
        match prompt_mode:
            case "conversation":
                return messages
            case "last_message":
                return messages[-1:]
            case _:  # text alone as the base LLM reads it, text with images as a caption in training
                if options.max_images > 0 or not all(isinstance(part, str) for part in question.model_input):
                    return question.model_input
                return "".join(part for part in question.parts if isinstance(part, str))

    def _read(self, session: Session, text: str, files: Sequence[str]) -> Turn:
        """The user's turn: first its images, scaled for the model, then its text."""
        if not text.strip() and not files:
            raise ValueError("a message must have a text or an image; write something, or add an image")
        limit = self._worker.engine.limits.max_prompt_images
        if len(files) > limit:
            raise ValueError(f"a message must have at most {limit} images, got {len(files)}; remove some")
        codec = self._model.codec.config
        turn = Turn("user")
        for file in map(Path, files):
            try:
                size = file.stat().st_size
                if size > MAX_UPLOAD_BYTES:
                    message = f"{file.name} must have at most {MAX_UPLOAD_BYTES} bytes, got {size}; scale it down"
                    raise ValueError(message)
                data = file.read_bytes()
            except FileNotFoundError:  # deleted to make room for newer uploads
                raise ValueError(f"{file.name} was deleted to make room for newer uploads; add it again") from None
            image = decode_image(data, file.name)
            if self._model.vision is None:
                [image] = to_pil(to_tensor(image, codec.image_size, codec.channels)[None])
            else:
                image.thumbnail((MAX_INPUT_SIDE, MAX_INPUT_SIDE))
            turn.parts.append(session.save(image, {}))
        if text.strip():
            turn.parts.append(text)
        return turn


def _add_events(session: Session, answer: Turn, events: Sequence[Event]) -> None:
    """Add events to the answer. If the disk is full, the answer ends with a note that says so."""
    try:
        for event in events:
            session.add_event(answer, event)
    except OSError as error:
        answer.is_finished = True
        answer.note = str(error)
