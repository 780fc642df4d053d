"""The source `folder`: a folder of images, with captions in .txt files beside them or in one metadata.jsonl."""

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lmfusion.data.samples import CaptionedImage
from lmfusion.data.sources.base import SingleBlock
from lmfusion.data.sources.captions import MAX_TEXT_BYTES, captions_of_text, captions_of_value, parse_json, read_lines
from lmfusion.data.sources.unused_files import (
    NO_IMAGE,
    SECOND_CAPTION,
    UnusedFiles,
    UnusedKind,
    looks_like_caption,
    looks_like_image,
    suffix_of,
    unread_kind,
)
from lmfusion.data.storage.files import StorageError, is_inside, load_image_file, read_file, retry
from lmfusion.data.storage.folder_walk import FoundFile, find_all
from lmfusion.images.formats import IMAGE_SUFFIXES
from lmfusion.utils.printing import printable

METADATA = "metadata.jsonl"
NOT_LISTED = f"images that {METADATA} does not name"


class ImageFolder(SingleBlock):
    """The source `folder`, read through its subfolders, in order of path.

    Captions come from `metadata.jsonl` at its top, if there is one: a line {"file_name": path in the folder, "text":
    caption or list of captions} for each image to use. Otherwise every image needs a file of the same name with the
    suffix .txt, with one caption on each line.

    An image without caption, or a line that is not such an object, is a damaged sample. Raises ValueError where there
    is no such folder, no image in it, or no image with a caption; StorageError where the folder cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self._folder = Path(path)
        if not self._folder.is_dir():
            raise ValueError(
                f"{path} must be a folder of images; for tars and parquet files, use their own kinds of source"
            )
        files = find_all(self._folder)
        metadata = self._folder / METADATA
        if metadata.is_file():
            entries = retry(partial(_read_metadata, metadata), os.fspath(metadata))
            self.unused = _not_listed(files, {entry.name for entry in entries})
        else:
            entries, self.unused = _pair(files)
        if not entries:
            raise ValueError(f"{path} must have images with captions, of .{', .'.join(IMAGE_SUFFIXES)}, but has none")
        self._entries = sorted(entries, key=lambda entry: (entry.name, entry.line))
        if all(entry.reason is not None for entry in entries):
            raise ValueError(
                f"images in {path} must have captions, but none of {len(entries)} has: {self._reason(entries[0])}"
            )

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> CaptionedImage:
        entry = self._entries[index]
        if entry.reason is not None:
            raise ValueError(self._reason(entry))
        captions = self._read_captions(entry) if entry.captions is None else entry.captions
        return CaptionedImage(printable(entry.name), partial(self._load, entry), captions)

    def _reason(self, entry: "_Entry") -> str:
        where = f"{METADATA}, line {entry.line}" if entry.line else printable(entry.name)
        return f"{where}: {printable(entry.reason or '')}"

    def _read_captions(self, entry: "_Entry") -> tuple[str, ...]:
        path = self._folder / entry.caption_file
        try:
            return captions_of_text(read_file(path, partial(_check_text, path.name)))
        except FileNotFoundError as error:
            raise StorageError(f"{printable(str(path))} is gone; it was there when the folder was opened") from error
        except ValueError as error:
            raise ValueError(f"{printable(entry.name)}: {printable(str(error))}") from error

    def _load(self, entry: "_Entry") -> Image.Image:
        path = self._folder / entry.name
        try:
            return load_image_file(path)
        except FileNotFoundError as error:
            if not entry.was_there:
                raise
            raise StorageError(f"{printable(str(path))} is gone; it was there when the folder was opened") from error


class _Entry(NamedTuple):
    """What is known about a sample when the folder is opened."""

    name: str
    """Path of the image in the folder, with slashes; "" where there is none."""
    captions: tuple[str, ...] | None = None
    """None: in its .txt file."""
    line: int = 0
    """Of metadata.jsonl; 0 without it."""
    reason: str | None = None
    """What is wrong with the line, or with the captions."""
    caption_file: str = ""
    """Path of the .txt file in the folder."""
    was_there: bool = False
    """Whether the image was there when the folder was opened."""


def _pair(files: Iterable[FoundFile]) -> tuple[list[_Entry], list[UnusedKind]]:
    """The images with their .txt files, and the files that are not used."""
    unused = UnusedFiles()
    texts: dict[str, str] = {}
    missing = {name for name, is_there in files if not is_there}
    for name, _ in files:
        if suffix_of(name) == "txt":
            stem = name[: -len(".txt")]
            if stem in texts:  # a.TXT and a.txt: the last one, in lower case, is used
                unused.add(SECOND_CAPTION, printable(texts[stem]))
            texts[stem] = name
    entries, with_image = [], set()
    for name, is_there in files:
        if suffix_of(name) in IMAGE_SUFFIXES:
            stem = name.rpartition(".")[0]
            with_image.add(stem)
            text = texts.get(stem, "")
            reason = None if text else f"no caption; write it to a .txt file of the same name, or use a {METADATA}"
            if text in missing:
                reason = f"its caption file {text} is a link to nothing"
            entries.append(_Entry(name, reason=reason, caption_file=text, was_there=is_there))
        elif looks_like_image(name):
            unused.add(unread_kind(name), printable(name))
        elif suffix_of(name) != "txt" and looks_like_caption(name):
            unused.add(f".{suffix_of(name)} files; captions are read from .txt files", printable(name))
    for stem, name in texts.items():
        if stem not in with_image:
            unused.add(NO_IMAGE, printable(name))
    return entries, unused.list()


def _not_listed(files: Iterable[FoundFile], listed: set[str]) -> list[UnusedKind]:
    """Images that the metadata does not name."""
    unused = UnusedFiles()
    for name, _ in files:
        if name not in listed and looks_like_image(name):
            unused.add(NOT_LISTED if suffix_of(name) in IMAGE_SUFFIXES else unread_kind(name), printable(name))
    return unused.list()


def _check_text(name: str, num_bytes: int) -> None:
    if num_bytes > MAX_TEXT_BYTES:
        raise ValueError(f"{name} must have at most {MAX_TEXT_BYTES} bytes, got {num_bytes}")


def _read_metadata(path: Path) -> list[_Entry]:
    entries = []
    seen: set[str] = set()
    with open(path, "rb") as file:
        for number, (line, length) in enumerate(read_lines(file, MAX_TEXT_BYTES), start=1):
            if line.strip() or length > MAX_TEXT_BYTES:
                entry = _parse(line, length, number)
                if entry.name in seen:
                    reason = f"{entry.name} is listed twice; give its captions as one list"
                    entry = _Entry("", line=number, reason=reason)
                seen.add(entry.name or f"\n{number}")
                entries.append(entry)
    return entries


def _parse(line: bytes, length: int, number: int) -> _Entry:
    try:
        if length > MAX_TEXT_BYTES:
            raise ValueError(f"the line must have at most {MAX_TEXT_BYTES} bytes, got {length}")
        value = parse_json(line)
        if not isinstance(value, dict) or not isinstance(value.get("file_name"), str) or "text" not in value:
            raise ValueError('the line must be an object like {"file_name": "cat.png", "text": "a cat"}')
        name = value["file_name"]
        if not is_inside(name):
            raise ValueError(f"file_name must be a path that stays in the folder, got {name!r}")
        name = Path(name).as_posix()  # "./cat.png" is "cat.png"
        return _Entry(name, captions_of_value(value["text"], "text"), number)
    except ValueError as error:
        return _Entry("", line=number, reason=str(error))
