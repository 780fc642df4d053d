"""How does a message become an answer? Uploads are read, a prompt is made, and the worker's events are taken in."""

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

MAX_SEEN_SIDE = 2048
"""Pixels of the longer side of a picture that a vision-language model sees; larger ones are made smaller."""
SECONDS_BETWEEN_UPDATES = 0.04
"""What happens meanwhile is shown together: a browser draws no more often, and a fast model would flood it."""


class Actions:
    """What the page can do for its tabs. `model` is the one that `worker` answers with."""

    def __init__(self, worker: "EngineWorker", model: "LMFusion", folder: Path) -> None:
        self.sessions = Sessions(folder)
        self._worker = worker
        self._model = model

    async def answer(
        self, session: Session, text: str, files: Sequence[str], options: "GenerationOptions", way: str
    ) -> AsyncIterator[list[Event]]:
        """Begin an answer in `session`, then yield what happens until it is done; first yields [] once it has begun.

        way: what the prompt is, one of `lmfusion.serving.page.settings.WAYS`. Whoever stops listening cancels the answer.

        Raises, before anything is in the session, ValueError for what cannot be answered, and QueueFull and Stopped as
        `EngineWorker.submit` does.
        """
        if session.is_busy:
            raise ValueError("an answer is being made here; wait for it, or stop it first")
        session.is_busy = True
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            asked = await asyncio.to_thread(self._read, session, text, files)
            prompt_like: PromptLike = session.messages(asked)[-1 if way == "message" else 0 :]
            if way == "plain":  # text alone as the base LLM reads it, with pictures as captions are read in training
                has_pictures = bool(files) or options.max_images > 0
                prompt_like = asked.readable if has_pictures else text
            prompt = await asyncio.to_thread(encode_prompt, self._model, prompt_like)
            session.answering = await asyncio.to_thread(self._worker.submit, prompt, options, tell)
            if session.is_closed:  # while the request waited to be taken
                return
            answer = session.begin(asked)
            yield []
            while not answer.is_finished:
                happened = [await events.get()]
                while not events.empty():
                    happened.append(events.get_nowait())
                if session.is_closed:
                    return
                await asyncio.to_thread(_take, session, answer, happened)
                yield happened
                await asyncio.sleep(SECONDS_BETWEEN_UPDATES)
        finally:
            session.stop()
            session.answering = None
            session.is_busy = False

    def _read(self, session: Session, text: str, files: Sequence[str]) -> Turn:
        """The user's turn: its pictures, then its text. Pictures become what the model sees of them."""
        if not text.strip() and not files:
            raise ValueError("there is nothing to answer; write something, or add a picture")
        limit = self._worker.engine.limits.max_prompt_images
        if len(files) > limit:
            raise ValueError(f"{len(files)} pictures are too many; the limit is {limit}")
        codec = self._model.codec.config
        turn = Turn("user")
        for file in map(Path, files):
            try:
                size = file.stat().st_size
                if size > MAX_UPLOAD_BYTES:
                    raise ValueError(f"{file.name} has {size} bytes; the limit is {MAX_UPLOAD_BYTES}, scale it down")
                data = file.read_bytes()
            except FileNotFoundError:  # it made room for newer uploads
                raise ValueError(f"{file.name} is no longer kept; add it again") from None
            image = decode_image(data, file.name)
            if self._model.vision is None:
                [image] = to_pil(to_tensor(image, codec.image_size, codec.channels)[None])
            else:
                image.thumbnail((MAX_SEEN_SIDE, MAX_SEEN_SIDE))
            turn.parts.append(session.keep(image, {}))
        if text.strip():
            turn.parts.append(text)
        return turn


def _take(session: Session, answer: Turn, events: Sequence[Event]) -> None:
    """Pass events on to the session. A disk that is full ends the answer, and says so."""
    try:
        for event in events:
            session.take(answer, event)
    except OSError as error:
        answer.is_finished = True
        answer.note = str(error)
