"""A folder of your own images, with captions in .txt files beside them or in one metadata.jsonl."""

import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lmfusion.data.captions import MAX_TEXT_BYTES, captions_of_text, captions_of_value, parse_json
from lmfusion.data.remote import is_inside, printable
from lmfusion.data.sources import CaptionedImage
from lmfusion.image.preprocessing import load_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = "metadata.jsonl"


class ImageFolder:
    """The source `folder`, read through its subfolders, in order of path.

    Captions come from `metadata.jsonl` at its top, if there is one: a line {"file_name": path in the folder, "text":
    caption or list of captions} for each image to use. Otherwise every image needs a file of the same name with the
    suffix .txt, with one caption a line.

    An image without caption or a line that is no such object is a damaged sample. Raises ValueError where there is no
    such folder, or no image in it.
    """

    def __init__(self, path: str | Path) -> None:
        self._folder = Path(path)
        if not self._folder.is_dir():
            raise ValueError(f"no folder of images at {path}; images elsewhere are read from tars or parquet files")
        metadata = self._folder / METADATA
        entries = _read_metadata(metadata) if metadata.is_file() else _find_images(self._folder)
        if not entries:
            raise ValueError(f"no images in {path}; it needs some of {', '.join(SUFFIXES)}, with captions")
        self._entries = sorted(entries, key=lambda entry: (entry.name, entry.line))

    @property
    def blocks(self) -> list[int]:
        return [len(self)]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> CaptionedImage:
        name, captions, line, reason = self._entries[index]
        if reason is not None:
            raise ValueError(f"{METADATA}, line {line}: {reason}")
        if captions is None:
            captions = self._read_captions(name)
        return CaptionedImage(printable(name), partial(load_image, self._folder / name), captions)

    def _read_captions(self, name: str) -> tuple[str, ...]:
        path = (self._folder / name).with_suffix(".txt")
        try:
            if not path.is_file():
                raise ValueError(f"no caption; write a .txt file of its name beside it, or use a {METADATA}")
            with open(path, "rb") as file:
                data = file.read(MAX_TEXT_BYTES + 1)
            if len(data) > MAX_TEXT_BYTES:
                raise ValueError(f"{path.name} has more than {MAX_TEXT_BYTES} bytes")
            return captions_of_text(data)
        except (ValueError, OSError) as error:
            raise ValueError(f"{printable(name)}: {error}") from error


class _Entry(NamedTuple):
    """What is known of a sample when the folder is opened."""

    name: str
    """Path of the image in the folder, with slashes; "" where there is none."""
    captions: tuple[str, ...] | None = None
    """None: in its .txt file."""
    line: int = 0
    """Of metadata.jsonl."""
    reason: str | None = None
    """What is wrong with the line."""


def _find_images(folder: Path) -> list[_Entry]:
    found = []
    for place, _, files in os.walk(folder):
        found += [Path(place, file) for file in files if file.lower().endswith(SUFFIXES) and not file.startswith(".")]
    return [_Entry(path.relative_to(folder).as_posix()) for path in found]


def _read_metadata(path: Path) -> list[_Entry]:
    entries = []
    seen: set[str] = set()
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                entry = _parse(line, number)
                if entry.name in seen:
                    reason = f"{entry.name} is listed twice; give its captions as one list"
                    entry = _Entry("", line=number, reason=reason)
                seen.add(entry.name or f"\n{number}")
                entries.append(entry)
    return entries


def _parse(line: bytes, number: int) -> _Entry:
    try:
        if len(line) > MAX_TEXT_BYTES:
            raise ValueError(f"the line has {len(line)} bytes; the limit is {MAX_TEXT_BYTES}")
        value = parse_json(line)
        if not isinstance(value, dict) or not isinstance(value.get("file_name"), str) or "text" not in value:
            raise ValueError('not an object like {"file_name": "cat.png", "text": "a cat"}')
        name = value["file_name"]
        if not is_inside(name):
            raise ValueError(f"file_name {name!r} leads out of the folder; name it relative to the folder")
        name = Path(name).as_posix()  # "./cat.png" is "cat.png"
        return _Entry(name, captions_of_value(value["text"], "text"), number)
    except ValueError as error:
        return _Entry("", line=number, reason=str(error))
