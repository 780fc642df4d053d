"""Captioned images in tars, as webdataset and img2dataset write them: 0001.jpg and 0001.txt are one sample.

A tar is gone through once, for an index of where its images lie and of all captions. The index is kept beside a local
tar (`photos.tar.<digits>.index`), or else in ~/.cache/lmfusion; images are read from the tar by their offset. An index
is made anew when its tar has changed.
"""

import bisect
import functools
import hashlib
import itertools
import json
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import safe_open, save

from lmfusion.data.captions import MAX_TEXT_BYTES, captions_of_json, captions_of_text
from lmfusion.data.remote import StoredFile, cached_name, find_files, map_threads, names_of, printable
from lmfusion.data.sources import CaptionedImage
from lmfusion.data.tar import DamagedTarError, Member, TarReader
from lmfusion.files import replacing
from lmfusion.image.preprocessing import check_file_size, decode_image

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CAPTION_SUFFIXES = ("txt", "json")
"""Where both are, the text counts."""
NUM_INDEXERS = 8
"""Tars indexed at the same time: most of the work is waiting for the disk or the network."""
NUM_OPEN = 4096
"""Indexes mapped into memory at a time; a process may have some 65,000 such maps."""

_FORMAT = "1"
_NAME = re.compile(r"((?:.*/)?[^./][^/.]*)\.([^/]+)", re.DOTALL)


class WebDataset:
    """The source `webdataset`: a tar, a glob or brace pattern of tars, or an fsspec address of such.

    image: suffix of the members that are images; None: jpg, jpeg, png or webp. caption: suffix of the members that
    hold captions: "txt" (one a line), "json" (at "caption" or "text"), or "json:KEY"; None: txt, and json where there
    is none. Members belong together that have the same name up to its first dot; they may lie anywhere in the tar.

    A sample without image or caption, and a tar that is damaged or cut off, is one damaged sample each. Raises
    FileNotFoundError where a file is missing, and ValueError where there is no good sample at all.
    """

    def __init__(self, path: str, image: str | None = None, caption: str | None = None) -> None:
        self._choice = _Choice.of(image, caption)
        self._files = find_files(path, ".tar")
        self._names = [printable(name) for name in names_of(self._files)]
        self._unsaved: dict[int, _Records] = {}
        self._records = functools.lru_cache(maxsize=NUM_OPEN)(self._open_records)
        sizes = list(map_threads(self._prepare, range(len(self._files)), NUM_INDEXERS))
        self.blocks = [num_samples for num_samples, _ in sizes]
        """Samples of each tar, the damaged ones included."""
        self._starts = [0, *itertools.accumulate(self.blocks)]
        if not any(num_good for _, num_good in sizes):
            raise ValueError(f"there is no captioned image in {path}: {self._reason(0)}")

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> CaptionedImage:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        tar = bisect.bisect_right(self._starts, index) - 1
        record = self._records(tar)[index - self._starts[tar]]
        sample_id = f"{self._names[tar]}/{record.key}" if record.key else self._names[tar]
        if record.reason is not None:
            raise ValueError(f"{sample_id}: {record.reason}")
        load_image = functools.partial(_load_image, self._files[tar], record.offset, record.size, sample_id)
        return CaptionedImage(sample_id, load_image, record.captions)

    def _reason(self, index: int) -> str:
        try:
            return self[index].sample_id
        except (ValueError, OSError) as error:
            return str(error)

    def _prepare(self, tar: int) -> tuple[int, int]:
        """(all samples, good ones) of a tar, from its index, which is made where it is missing or out of date."""
        expected = self._metadata(tar)
        for path in self._index_paths(tar):
            try:
                with safe_open(path, framework="np") as index:
                    metadata = index.metadata() or {}
            except (OSError, SafetensorError):
                continue
            if expected.items() <= metadata.items():
                return int(metadata["num_samples"]), int(metadata["num_good"])
        records = [*_index_tar(self._files[tar], self._choice)]
        num_good = sum(record.reason is None for record in records)
        arrays = _Records.arrays(records)
        metadata = {**expected, "num_samples": str(len(records)), "num_good": str(num_good)}
        if not any(_save(path, arrays, metadata) for path in self._index_paths(tar)):
            self._unsaved[tar] = _Records(arrays)
        return len(records), num_good

    def _open_records(self, tar: int) -> "_Records":
        if tar in self._unsaved:
            return self._unsaved[tar]
        expected = self._metadata(tar)
        for path in self._index_paths(tar):
            try:
                index = safe_open(path, framework="np")
            except (OSError, SafetensorError):
                continue
            if expected.items() <= (index.metadata() or {}).items():
                return _Records({name: index.get_slice(name) for name in _Records.NAMES})
        raise OSError(f"the index of {self._files[tar].address} is gone, which was there when the data set was opened")

    def _index_paths(self, tar: int) -> list[Path]:
        """Where the index of a tar may lie, in order of preference."""
        file = self._files[tar]
        suffix = f".{self._choice.digest}.index"
        cached = cached_name(file.address if not file.is_local else os.path.abspath(file.address), suffix)
        return [Path(file.address + suffix), cached] if file.is_local else [cached]

    def _metadata(self, tar: int) -> dict[str, str]:
        file = self._files[tar]
        return {"format": _FORMAT, "size": str(file.size), "version": file.version}


class _Choice(NamedTuple):
    """Which members are images and captions."""

    images: tuple[str, ...]
    captions: tuple[str, ...]
    key: str | None
    """Of the JSON object."""

    @classmethod
    def of(cls, image: str | None, caption: str | None) -> "_Choice":
        images = IMAGE_SUFFIXES if image is None else (image.lstrip(".").lower(),)
        suffix, _, key = (caption or "").lstrip(".").partition(":")
        captions = CAPTION_SUFFIXES if caption is None else (suffix.lower(),)
        if not (images[0] and captions[0]):
            raise ValueError("image and caption are suffixes of members, such as jpg and txt; they cannot be empty")
        return cls(images, captions, key or None)

    @property
    def digest(self) -> str:
        return hashlib.blake2b(repr(tuple(self)).encode(), digest_size=4).hexdigest()

    def captions_of(self, suffix: str, data: bytes) -> tuple[str, ...]:
        if self.key is not None or suffix.rpartition(".")[2] == "json":
            return captions_of_json(data, self.key)
        return captions_of_text(data)


class _Record(NamedTuple):
    """A sample, good or damaged, as the index holds it."""

    key: str
    """"" for what is wrong with the tar itself."""
    captions: tuple[str, ...]
    reason: str | None
    """What is wrong with it."""
    offset: int = 0
    size: int = 0
    """Of the image, in bytes."""


class _Records:
    """The samples of one tar in three arrays, which may lie in a file: only what is asked for is read."""

    NAMES = ("image", "text_end", "text")

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._image, self._text_end, self._text = (arrays[name] for name in self.NAMES)

    def __getitem__(self, index: int) -> _Record:
        first = int(self._text_end[index - 1 : index][0]) if index else 0
        last = int(self._text_end[index : index + 1][0])
        key, captions, reason = json.loads(self._text[first:last].tobytes())
        offset, size = self._image[index : index + 1][0].tolist()
        return _Record(key, tuple(captions), reason, offset, size)

    @classmethod
    def arrays(cls, records: list[_Record]) -> dict[str, np.ndarray]:
        texts = [json.dumps([record.key, record.captions, record.reason]).encode() for record in records]
        return {
            "image": np.array([(record.offset, record.size) for record in records], np.int64),
            "text_end": np.cumsum([len(text) for text in texts], dtype=np.int64),
            "text": np.frombuffer(b"".join(texts), np.uint8),
        }


class _Parts:
    """What was found of one sample so far."""

    def __init__(self) -> None:
        self.suffixes: list[str] = []
        self.images: dict[str, Member] = {}
        self.captions: dict[str, tuple[str, ...] | str] = {}
        """By suffix; a text is the reason why there are none."""


def _index_tar(file: StoredFile, choice: _Choice) -> list[_Record]:
    """Its samples in order of their first members, and at last what is wrong with the tar, if anything is."""
    reader = TarReader(file)
    samples: dict[str, _Parts] = {}
    problem = None
    try:
        for member in reader.members():
            match = _NAME.fullmatch(member.name)
            if match is None:  # no suffix, or a hidden file such as macOS adds
                continue
            key, suffix = match[1].removeprefix("./"), match[2].lower()
            parts = samples.setdefault(key, _Parts())
            parts.suffixes.append(suffix)
            if suffix in choice.images:
                parts.images[suffix] = member
            if suffix in choice.captions:
                parts.captions[suffix] = _read_captions(reader, member, suffix, choice)
    except DamagedTarError as error:
        problem = str(error)
        key, parts = next(reversed(samples.items()), ("", _Parts()))
        if not (parts.images and parts.captions):  # the sample that the tar broke off in is no further damage
            samples.pop(key, None)
    records = [_record(key, parts, choice) for key, parts in samples.items() if parts.images or parts.captions]
    if problem is None and not records:
        problem = f"holds no {', '.join(choice.images)} with captions"
    return records if problem is None else [*records, _Record("", (), f"the tar {problem}")]


def _read_captions(reader: TarReader, member: Member, suffix: str, choice: _Choice) -> tuple[str, ...] | str:
    if member.size > MAX_TEXT_BYTES:
        return f".{suffix} has {member.size} bytes; the limit is {MAX_TEXT_BYTES}"
    data = reader.read(member.offset, member.size)
    try:
        return choice.captions_of(suffix, data)
    except ValueError as error:
        return f".{suffix}: {error}"


def _record(key: str, parts: _Parts, choice: _Choice) -> _Record:
    captions = next((parts.captions[suffix] for suffix in choice.captions if suffix in parts.captions), None)
    image = next((parts.images[suffix] for suffix in choice.images if suffix in parts.images), None)
    key = printable(key)
    there = f"only {printable(', '.join(parts.suffixes))}"
    if len(set(parts.suffixes)) < len(parts.suffixes):
        return _Record(key, (), "a member of the same name is in the tar twice")
    if image is None:
        return _Record(key, (), f"no image ({', '.join(choice.images)}) in the tar, {there}")
    if captions is None:
        return _Record(key, (), f"no caption ({', '.join(choice.captions)}) in the tar, {there}")
    if isinstance(captions, str):
        return _Record(key, (), captions)
    return _Record(key, captions, None, image.offset, image.size)


def _load_image(file: StoredFile, offset: int, size: int, name: str) -> Image.Image:
    check_file_size(size, name)
    return decode_image(file.read(offset, size), name)


def _save(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> bool:
    """Write an index whole, or not at all where the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, writer=f"{os.getpid()}-{threading.get_ident()}") as file:
            file.write(save(arrays, metadata))
    except OSError:
        return False
    return True
