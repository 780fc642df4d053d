"""Shows answers on a terminal while they are generated: text in order, a progress bar per image, files at once."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lmfusion.generation.events import Done, Event, ImageBegin, ImageEnd, ImagePreview, TextDelta
from lmfusion.images.png import save_png

if TYPE_CHECKING:
    from lmfusion.generation.options import GenerationOptions


@dataclass(frozen=True)
class CommandRequest:
    """A request of the command line: one answer to one prompt."""

    prompt: str
    images: tuple[str, ...]
    """Files of the prompt's images."""
    chat: bool
    index: int
    """With the seed, the key of the random numbers."""
    options: "GenerationOptions"

    @property
    def is_image_only(self) -> bool:
        """Whether the answer is an image without text."""
        return self.options.draw_first and self.options.max_new_tokens == 0

    def record(self) -> dict[str, Any]:
        """What is needed besides the options to repeat the request."""
        return {"prompt": self.prompt, "prompt_images": list(self.images), "chat": self.chat, "index": self.index}


class ProgressDisplay:
    """Shows the events of several answers, and saves their images.

    Text goes to stdout in the order of the requests; the text of later answers is held back until their turn. A single
    answer is printed token by token, one of several line by line, since the lines below show progress bars.
    """

    saved: list[Path]
    """Files of the finished images."""
    num_failed: int
    """Answers that ended with an error."""

    def __init__(self, requests: Sequence[CommandRequest], folder: Path, *, keep_previews: bool, verbose: bool) -> None:
        self.saved, self.num_failed = [], 0
        self._answers = [_AnswerOutput(request) for request in requests]
        self._turn = 0
        self._folder, self._keep_previews, self._verbose = folder, keep_previews, verbose
        self._next_number = _first_free_number(folder)

    def show(self, i: int, event: Event) -> None:
        """Take an event of the answer to request `i`."""
        answer = self._answers[i]
        if isinstance(event, TextDelta):
            answer.add_text(event.text)
        elif isinstance(event, ImageBegin):
            answer.end_line()
            answer.number = self._take_number()
            answer.bar = _bar(f"{answer.number:04d}.png", event.num_steps)
        elif isinstance(event, ImagePreview):
            answer.advance(event.step)
            if self._keep_previews:
                path = self._folder / f"{answer.number:04d}.step{event.step:04d}.png"
                save_png(path, event.image, {**answer.request.record(), "step": event.step})
        elif isinstance(event, ImageEnd):
            answer.add_image(self._save(answer, event))
        else:
            self._finish(answer, event)
        self._write()

    def close(self) -> None:
        """Remove the bars, and write the text of unfinished answers that was held back."""
        for answer in self._answers:
            answer.end()
        self._write()

    def _save(self, answer: "_AnswerOutput", event: ImageEnd) -> Path:
        settings = {**event.settings, **answer.request.record(), "image": event.index}
        settings.pop("preview_every", None)  # the image does not depend on it
        while True:
            path = self._folder / f"{answer.number:04d}.png"
            try:
                save_png(path, event.image, settings, overwrite=False)
            except FileExistsError:  # another process saves to the same folder
                answer.number = self._take_number()
            else:
                self.saved.append(path)
                return path

    def _take_number(self) -> int:
        self._next_number += 1
        return self._next_number - 1

    def _finish(self, answer: "_AnswerOutput", event: Done) -> None:
        answer.end()
        self._write()
        if event.finish_reason == "error":
            self.num_failed += 1
            self._print_error(f"lmfusion: error: {event.error} (prompt: {answer.request.prompt!r:.80})")
        if self._verbose:
            self._print_error(
                f"{event.finish_reason}: {event.num_prompt_tokens} prompt tokens, {event.num_new_tokens} text tokens, "
                f"{event.num_images} images, {event.seconds:.2f} s"
            )

    def _write(self) -> None:
        """Write the text of the answer whose turn it is, and of the next ones once it is finished."""
        while self._turn < len(self._answers):
            answer = self._answers[self._turn]
            text = answer.take(whole_lines=len(self._answers) > 1)
            if text:
                with tqdm.external_write_mode(file=sys.stdout):
                    sys.stdout.write(text)
                    sys.stdout.flush()
            if not answer.is_finished:
                return
            self._turn += 1

    def _print_error(self, text: str) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            print(text, file=sys.stderr)


class _AnswerOutput:
    """The text of one answer that is not written yet, and the progress bar of its current image."""

    def __init__(self, request: CommandRequest) -> None:
        self.request = request
        self.number = 0
        self.bar: tqdm[Any] | None = None
        self.is_finished = False
        self._text = ""
        self._is_mid_line = False
        # A chat's answer is shown without the white space around its texts; continued text keeps it
        self._strips = request.chat
        self._at_start = True
        self._space = ""
        if not request.chat and not request.is_image_only:
            self._add(request.prompt)

    def add_text(self, text: str) -> None:
        if self._strips:
            text = self._space + text
            words = text.rstrip()
            self._space = text[len(words) :]
            text = words.lstrip() if self._at_start else words
        if text:
            self._at_start = False
            self._add(text)

    def add_image(self, path: Path) -> None:
        self._add(f"{path}\t{self.request.prompt}\n" if self.request.is_image_only else f"{path}\n")
        self._end_bar()

    def advance(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def end_line(self) -> None:
        if self._is_mid_line:
            self._add("\n")
        self._at_start, self._space = True, ""

    def end(self) -> None:
        self.end_line()
        self._end_bar()
        self.is_finished = True

    def take(self, whole_lines: bool) -> str:
        """The text that may be written now. It is returned once."""
        end = self._text.rfind("\n") + 1 if whole_lines else len(self._text)
        text, self._text = self._text[:end], self._text[end:]
        return text

    def _add(self, text: str) -> None:
        self._text += text
        self._is_mid_line = not text.endswith("\n")

    def _end_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar.fp.write("\r")  # tqdm does this only for the first bar
            self.bar = None


def _bar(name: str, num_steps: int) -> "tqdm[Any] | None":
    """A progress bar on stderr, if that is a terminal."""
    return tqdm(total=num_steps, desc=name, unit="step", leave=False) if sys.stderr.isatty() else None


def _first_free_number(folder: Path) -> int:
    """The number after all images of a folder, including those that another process is writing."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max(
        (int(found[1]) + 1 for name in names if (found := re.match(r"(\d{4,})\.(step\d+\.)?png", name))), default=0
    )
