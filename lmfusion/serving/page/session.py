"""What does one browser tab hold? Its conversation, its pictures, and the answer that is being made."""

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
"""Tabs remembered."""
MAX_PICTURES = 200
"""Drawn pictures of a tab that its gallery shows, the newest."""


@dataclass
class Drawing:
    """A picture on its way. One that was stopped stays what its last preview showed."""

    width: int
    height: int
    num_steps: int
    step: int = 0
    preview: Image.Image | None = None
    is_stopped: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture of the conversation, in a PNG file that remembers what it was made with."""

    image: Image.Image
    path: Path
    settings: dict[str, Any]
    """Empty for a picture that somebody brought along."""


Part = str | Drawing | Picture


@dataclass
class Turn:
    """What one side said, in its order. `note` is the page's remark about it, and no part of the conversation."""

    role: str
    parts: list[Part] = field(default_factory=list)
    note: str = ""
    is_finished: bool = True

    @property
    def readable(self) -> list[str | Image.Image]:
        """What the model reads of it: texts and images, without pictures that were not finished."""
        parts = [part.image if isinstance(part, Picture) else part for part in self.parts]
        return [part for part in parts if not isinstance(part, Drawing) and part != ""]


class Session:
    """The state of a tab. Its pictures lie in a folder of its own, whose name nobody guesses."""

    turns: list[Turn]
    """A user's turn, the assistant's answer to it, and so on; the last answer may be in the making."""
    pictures: list[Picture]
    """What was drawn, in its order. Clearing the conversation keeps it."""
    answering: "ResponseStream | None"

    def __init__(self, root: Path) -> None:
        self.turns = []
        self.pictures = []
        self.answering = None
        self.is_busy = False
        self.is_closed = False
        self._folder = root / secrets.token_urlsafe(16)
        self._num_files = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing would be lost with it."""
        return not self.turns and not self.pictures and not self.is_busy

    def keep(self, image: Image.Image, settings: dict[str, Any]) -> Picture:
        """Write an image into the session's folder, its settings inside."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._num_files += 1
        path = self._folder / f"picture-{self._num_files:04d}.png"
        save_png(path, image, settings)
        return Picture(image, path, settings)

    def messages(self, asked: Turn) -> list[dict[str, Any]]:
        """The conversation as a prompt that ends with `asked`. A turn that got no answer is left out."""
        turns: list[Turn] = []
        for question, answer in zip(self.turns[::2], self.turns[1::2], strict=True):
            if answer.readable:
                turns += [question, answer]
        return [{"role": turn.role, "content": turn.readable} for turn in [*turns, asked]]

    def begin(self, asked: Turn) -> Turn:
        """Take up the user's turn; answer with the empty one that `take` fills."""
        answer = Turn("assistant", is_finished=False)
        self.turns += [asked, answer]
        return answer

    def take(self, answer: Turn, event: Event) -> None:
        """Let an answer go on by one event."""
        match event:
            case TextDelta(text):
                before = answer.parts[-1] if answer.parts else None
                if isinstance(before, str):
                    answer.parts[-1] = before + text
                else:
                    answer.parts.append(text)
            case ImageBegin(_, width, height, num_steps):
                answer.parts.append(Drawing(width, height, num_steps))
            case ImagePreview(_, step, num_steps, image):
                answer.parts[-1] = Drawing(image.width, image.height, num_steps, step, image)
            case ImageEnd(_, image, settings):
                picture = self.keep(image, settings)
                answer.parts[-1] = picture
                self.pictures = [*self.pictures, picture][-MAX_PICTURES:]
            case Done():
                self._finish(answer, event)

    def _finish(self, answer: Turn, done: Done) -> None:
        answer.is_finished = True
        for part in answer.parts:
            if isinstance(part, Drawing):
                part.is_stopped = True
        answer.note = {
            "cancelled": "Stopped.",
            "length": "Cut off here: this is the longest answer allowed.",
            "error": f"This answer failed: {done.error}",
        }.get(done.finish_reason, "" if answer.parts else "The model has nothing to say to this.")

    def stop(self) -> None:
        """Cancel the answer that is being made; what is there of it stays."""
        if self.answering is not None:
            self.answering.cancel()

    def clear(self) -> None:
        """Begin a new conversation. The pictures stay."""
        self.stop()
        self.turns = []

    def close(self) -> None:
        """Cancel what runs and remove the pictures."""
        self.clear()
        self.is_closed = True
        self.pictures = []
        shutil.rmtree(self._folder, ignore_errors=True)


class Sessions:
    """The tabs that are open, by the name that the page in the browser gives itself; to be used in one thread.

    Anybody can make up names. So where there are too many, the address that has most sessions loses one: the one that
    holds nothing, or else the one that was quiet the longest. A session that waits for an answer is never forgotten.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._addresses: dict[str, str] = {}

    def of(self, name: str | None, address: str = "") -> Session:
        """The session of a tab at a client's address, a new one where it has none.

        Raises ValueError without a name, and where all sessions that could be forgotten wait for answers.
        """
        if not name:
            raise ValueError("this request comes from no open page; reload it")
        if name not in self._sessions:
            if len(self._sessions) >= MAX_SESSIONS:
                self._forget_one(address)
            self._sessions[name] = Session(self._root)
            self._addresses[name] = address
        self._sessions.move_to_end(name)
        return self._sessions[name]

    def find(self, name: str | None) -> Session | None:
        """The session of a tab, if it has one."""
        return self._sessions.get(name or "")

    def close(self, name: str | None) -> None:
        """Forget a tab that was closed, and cancel what it was waiting for."""
        session = self._sessions.pop(name or "", None)
        if session is not None:
            del self._addresses[name or ""]
            session.close()

    def _forget_one(self, newcomer: str) -> None:
        counts = Counter([*self._addresses.values(), newcomer])
        idle = [name for name, session in self._sessions.items() if not session.is_busy]
        if not idle:
            raise ValueError("too many people use this page at the moment; try again in a minute")
        most = max(counts[self._addresses[name]] for name in idle)
        candidates = [name for name in idle if counts[self._addresses[name]] == most]
        self.close(next((name for name in candidates if self._sessions[name].is_empty), candidates[0]))

    def __len__(self) -> int:
        return len(self._sessions)
