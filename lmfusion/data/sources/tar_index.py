"""The index of a tar on the disk: where its samples lie, and their captions, with a checksum of everything.

The format is our own: captions of millions of samples stay in the mapped file, and an index that is damaged, cut off or
of another tar must be noticed. An index in JSON would have to be read as a whole.

    sha256 of the header (32 bytes), its length (8), the header (JSON), and then the arrays, one after another:
    image     int64 [samples, 2]: where the image lies in the tar, and its size, in bytes
    text_end  int64 [samples]: where the text of each sample ends
    text      uint8: of each sample its name, captions, and what is wrong with it, as JSON

The header holds what the index was made of, the numbers of samples, the unused files, and the sha256 of the arrays. The
arrays stay in the file and are read from there when they are needed. A damaged index is ignored, and made again from
the tar.
"""

import hashlib
import json
import mmap
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmfusion.data.sources.tar_samples import Record
from lmfusion.data.sources.unused_files import UnusedKind
from lmfusion.utils.files import atomic_write

FORMAT = 2
MAX_HEADER_BYTES = 1024 * 1024
_DIGEST_BYTES = hashlib.sha256().digest_size
_START = _DIGEST_BYTES + 8
_RECORD_BYTES = 3 * 8


class Summary(NamedTuple):
    """What a data set needs to know about a tar when it is opened."""

    num_samples: int
    """The damaged ones included."""
    num_good: int
    unused: list[UnusedKind]


class Records:
    """The samples of one tar."""

    def __init__(self, arrays: Any, num_samples: int) -> None:
        """arrays: a buffer with the three arrays, one after another."""
        self._image = np.frombuffer(arrays, "<i8", 2 * num_samples).reshape(num_samples, 2)
        self._text_end = np.frombuffer(arrays, "<i8", num_samples, 16 * num_samples)
        self._text = np.frombuffer(arrays, np.uint8, -1, _RECORD_BYTES * num_samples) if num_samples else b""

    def __getitem__(self, index: int) -> Record:
        first = int(self._text_end[index - 1]) if index else 0
        key, captions, reason = json.loads(bytes(self._text[first : int(self._text_end[index])]))
        offset, size = self._image[index].tolist()
        return Record(key, tuple(captions), reason, offset, size)


def to_arrays(records: list[Record]) -> bytes:
    """The arrays of an index, as `Records` takes them."""
    texts = [json.dumps([record.key, record.captions, record.reason]).encode() for record in records]
    image = np.array([(record.offset, record.size) for record in records], "<i8")
    text_end = np.cumsum([len(text) for text in texts], dtype="<i8")
    return image.tobytes() + text_end.tobytes() + b"".join(texts)


def save_index(path: Path, made_of: Mapping[str, Any], summary: Summary, arrays: bytes) -> bool:
    """Write an index as a whole. Returns whether the folder could be written. made_of: what identifies the tar."""
    header = {
        **_expected(made_of),
        "num_samples": summary.num_samples,
        "num_good": summary.num_good,
        "unused": [asdict(unused) for unused in summary.unused],
        "sha256": hashlib.sha256(arrays).hexdigest(),
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that arrays begin at multiples of 8 bytes
    data = hashlib.sha256(text).digest() + len(text).to_bytes(8, "little") + text + arrays
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, writer=f"{os.getpid()}-{threading.get_ident()}") as file:
            file.write(data)
    except OSError:
        return False
    return True


def read_summary(path: Path, made_of: Mapping[str, Any]) -> Summary | None:
    """The summary in the header of an index. None if there is none, it is damaged, or it belongs to another tar."""
    read = _read_header(path, made_of)
    if read is None:
        return None
    header, start = read
    try:
        unused = [
            UnusedKind(str(item["kind"]), int(item["count"]), list(map(str, item["names"])))
            for item in header["unused"]
        ]
        num_samples, num_good = int(header["num_samples"]), int(header["num_good"])
        num_bytes = path.stat().st_size - start
    except (KeyError, TypeError, ValueError, OSError):
        return None
    if not 0 <= num_good <= num_samples <= num_bytes // _RECORD_BYTES:
        return None
    return Summary(num_samples, num_good, unused)


def open_records(path: Path, made_of: Mapping[str, Any]) -> Records | None:
    """The samples that an index holds. None as in `read_summary`, and where the arrays have another checksum."""
    read = _read_header(path, made_of)
    if read is None:
        return None
    header, start = read
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # gone, or empty by now
        return None
    arrays = memoryview(mapped)[start:]
    if hashlib.sha256(arrays).hexdigest() != header.get("sha256") or read_summary(path, made_of) is None:
        return None
    return Records(arrays, int(header["num_samples"]))


def _expected(made_of: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, **made_of}


def _read_header(path: Path, made_of: Mapping[str, Any]) -> tuple[dict[str, Any], int] | None:
    """The header of an index, and where it ends; None unless its checksum is right, so that `save_index` wrote it."""
    try:
        if not path.is_file():  # opening a pipe would wait for its other end
            return None
        with open(path, "rb") as file:
            start = file.read(_START)
            length = int.from_bytes(start[_DIGEST_BYTES:], "little")
            text = file.read(length) if length <= MAX_HEADER_BYTES else b""
    except OSError:
        return None
    if not text or hashlib.sha256(text).digest() != start[:_DIGEST_BYTES]:
        return None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(header, dict):
        return None
    return (header, _START + length) if _expected(made_of).items() <= header.items() else None
