"""The state of the page's browser tabs: conversation, images, and the answer that is being generated."""

import secrets
import shutil
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lmfusion.generation.events import Done, Event, ImageBegin, ImageEnd, ImagePreview, TextDelta
from lmfusion.images.png import save_png

if TYPE_CHECKING:
    from lmfusion.generation.worker import ResponseStream

MAX_SESSIONS = 256
"""Tabs that are remembered."""
MAX_GALLERY_IMAGES = 200
"""Images in the gallery of a tab. The oldest are dropped."""


@dataclass
class PartialImage:
    """An image that is being denoised, or was stopped and shows its last preview."""

    width: int
    height: int
    num_steps: int
    step: int = 0
    preview: Image.Image | None = None
    is_stopped: bool = False


@dataclass(frozen=True)
class ChatImage:
    """A finished image of the conversation, in a PNG file with its settings."""

    image: Image.Image
    path: Path
    settings: dict[str, Any]
    """How it was generated. Empty for an uploaded image."""


TurnPart = str | PartialImage | ChatImage


@dataclass
class Turn:
    """One message of the conversation. `note` is a remark of the page, which the model does not read."""

    role: str
    parts: list[TurnPart] = field(default_factory=list)
    note: str = ""
    is_finished: bool = True

    @property
    def model_input(self) -> list[str | Image.Image]:
        """Its texts and finished images, which the model reads."""
        parts = [part.image if isinstance(part, ChatImage) else part for part in self.parts]
        return [part for part in parts if not isinstance(part, PartialImage) and part != ""]


class Session:
    """The state of a tab. Its images are stored in a folder of its own, whose name cannot be guessed."""

    turns: list[Turn]
    """A user's turn, the assistant's answer, and so on. The last answer may still be generated."""
    images: list[ChatImage]
    """Generated images, the oldest first. Clearing the conversation keeps them."""
    stream: "ResponseStream | None"
    """The answer that is being generated."""

    def __init__(self, root: Path) -> None:
        self.turns = []
        self.images = []
        self.stream = None
        self.is_busy = False
        self.is_closed = False
        self._folder = root / secrets.token_urlsafe(16)
        self._num_files = 0

    @property
    def is_empty(self) -> bool:
        """Whether it holds nothing that the user would miss."""
        return not self.turns and not self.images and not self.is_busy

    def save(self, image: Image.Image, settings: dict[str, Any]) -> ChatImage:
        """Write an image and its settings into the session's folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._num_files += 1
        path = self._folder / f"image-{self._num_files:04d}.png"
        save_png(path, image, settings)
        return ChatImage(image, path, settings)

    def messages(self, question: Turn) -> list[dict[str, Any]]:
        """The conversation as a prompt that ends with `question`. Turns without an answer are left out."""
        turns: list[Turn] = []
        for user, answer in zip(self.turns[::2], self.turns[1::2], strict=True):
            if answer.model_input:
                turns += [user, answer]
        return [{"role": turn.role, "content": turn.model_input} for turn in [*turns, question]]

    def begin(self, question: Turn) -> Turn:
        """Add the user's turn and an empty answer, which `add_event` fills. Returns the answer."""
        answer = Turn("assistant", is_finished=False)
        self.turns += [question, answer]
        return answer

    def add_event(self, answer: Turn, event: Event) -> None:
        """Add one event to an answer."""
        match event:
            case TextDelta(text):
                last = answer.parts[-1] if answer.parts else None
                if isinstance(last, str):
                    answer.parts[-1] = last + text
                else:
                    answer.parts.append(text)
            case ImageBegin(_, width, height, num_steps):
                answer.parts.append(PartialImage(width, height, num_steps))
            case ImagePreview(_, step, num_steps, image):
                answer.parts[-1] = PartialImage(image.width, image.height, num_steps, step, image)
            case ImageEnd(_, image, settings):
                finished = self.save(image, settings)
                answer.parts[-1] = finished
                self.images = [*self.images, finished][-MAX_GALLERY_IMAGES:]
            case Done():
                self._finish(answer, event)

    def _finish(self, answer: Turn, done: Done) -> None:
        answer.is_finished = True
        for part in answer.parts:
            if isinstance(part, PartialImage):
                part.is_stopped = True
        answer.note = {
            "cancelled": "Stopped.",
            "length": "Cut off: the answer has reached Max tokens or the end of the model's context.",
            "error": f"This answer failed: {done.error}",
        }.get(done.finish_reason, "" if answer.parts else "The model gave an empty answer.")

    def stop(self) -> None:
        """Cancel the answer that is being generated. Its finished parts stay."""
        if self.stream is not None:
            self.stream.cancel()

    def clear(self) -> None:
        """Start a new conversation. The generated images stay."""
        self.stop()
        self.turns = []

    def close(self) -> None:
        """Cancel the answer and delete the images."""
        self.clear()
        self.is_closed = True
        self.images = []
        shutil.rmtree(self._folder, ignore_errors=True)


class Sessions:
    """The open tabs, by the name that the page in the browser gives itself. Use it in one thread only.

    Anybody can invent names. So when there are too many sessions, the address with the most sessions loses one: an
    empty one, or else the least recently used. A session that waits for an answer is never dropped.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._addresses: dict[str, str] = {}

    def of(self, name: str | None, address: str = "") -> Session:
        """The session of a tab at a client's address. It is created if there is none.

        Raises:
            ValueError: without a name, and if all sessions wait for answers, so that none can be dropped.
        """
        if not name:
            raise ValueError("the request must come from an open page; reload the page")
        if name not in self._sessions:
            if len(self._sessions) >= MAX_SESSIONS:
                self._drop_one(address)
            self._sessions[name] = Session(self._root)
            self._addresses[name] = address
        self._sessions.move_to_end(name)
        return self._sessions[name]

    def find(self, name: str | None) -> Session | None:
        """The session of a tab, or None."""
        return self._sessions.get(name or "")

    def close(self, name: str | None) -> None:
        """Drop the session of a closed tab and cancel its answer."""
        session = self._sessions.pop(name or "", None)
        if session is not None:
            del self._addresses[name or ""]
            session.close()

    def _drop_one(self, newcomer: str) -> None:
        counts = Counter([*self._addresses.values(), newcomer])
        idle = [name for name, session in self._sessions.items() if not session.is_busy]
        if not idle:
            raise ValueError(f"at most {MAX_SESSIONS} tabs can wait for answers at a time; try again in a minute")
        most = max(counts[self._addresses[name]] for name in idle)
        candidates = [name for name in idle if counts[self._addresses[name]] == most]
        self.close(next((name for name in candidates if self._sessions[name].is_empty), candidates[0]))

    def __len__(self) -> int:
        return len(self._sessions)
