"""Reads captions from text files, JSON objects and cells of tables."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from lmfusion.utils.config_values import short_repr

MAX_TEXT_BYTES = 1024 * 1024
"""Of the text or JSON of one sample: hundreds of pages. More is taken for damage, and is not read."""
MAX_LINE_BYTES = 16 * 1024 * 1024
"""Of a line of JSON, which is an interleaved document with all its texts."""
CAPTION_KEYS = ("caption", "text")
"""Keys under which a JSON object may have its caption, or a list of captions, by default."""


def captions_of_text(data: bytes) -> tuple[str, ...]:
    """The captions of a .txt file, one on each line. Only newlines end lines: captions may hold other separators.

    Raises ValueError where it is not UTF-8 or is empty.
    """
    return checked_captions([line for line in decode_text(data).split("\n") if line.strip()])


def captions_of_json(data: bytes, key: str | None = None) -> tuple[str, ...]:
    """The captions of a JSON object: the text, or list of texts, at `key` (None: at the first of CAPTION_KEYS).

    Raises ValueError where there is none.
    """
    value = parse_json(data)
    keys = CAPTION_KEYS if key is None else (key,)
    found = next((k for k in keys if k in value), None) if isinstance(value, dict) else None
    if found is None:
        raise ValueError(f"the JSON must have the key {' or '.join(keys)}")
    return captions_of_value(value[found], found)


def captions_of_value(value: Any, name: str) -> tuple[str, ...]:
    """One text, or a list of texts without its nulls, as captions. name: how errors refer to it.

    Raises ValueError for anything else, and where no caption is left.
    """
    captions = [caption for caption in value if caption is not None] if isinstance(value, list) else [value]
    if not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{name} must be a text or a list of texts, got {short_repr(value)}")
    return checked_captions(captions)


def checked_captions(captions: Sequence[str]) -> tuple[str, ...]:
    """`captions` themselves. Raises ValueError for none, an empty one, or one that is not valid Unicode."""
    if not captions or not all(caption.strip() for caption in captions):
        raise ValueError("the caption is empty; write one, or leave the image out")
    return tuple(map(check_unicode, captions))


def check_unicode(text: str) -> str:
    """`text` itself. Raises ValueError where it cannot be written as UTF-8: JSON may hold half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text must be valid Unicode: {error}") from None
    return text


def decode_text(data: bytes) -> str:
    """UTF-8, with or without a byte order mark. Raises ValueError for anything else."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the text must be UTF-8: {error.reason} at byte {error.start}") from None


def parse_json(data: bytes) -> Any:
    """The value of a JSON text. Raises ValueError where it is damaged."""
    text = decode_text(data)
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"the JSON is damaged: {error}") from None


def read_lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Every line of a file, and its length in bytes with its newline.

    Of a line longer than `max_bytes`, only the first bytes are returned, and no more is held in memory.
    """
    while line := file.readline(max_bytes + 1):
        length, last = len(line), line
        while not last.endswith(b"\n") and (last := file.readline(max_bytes + 1)):
            length += len(last)
        yield line, length
