"""PNG files that hold the settings their image was made with, as text for programs and for viewers.

The chunk "lmfusion" holds the settings as JSON. The chunk "parameters" holds them in the form of other image
generators, which many viewers show. Chunks are read here and not through Pillow's `Image.text`, which decodes all
pixels to find text after them, and reads up to 64 MiB of text.
"""

import json
import os
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lmfusion.images.formats import PNG_SIGNATURE
from lmfusion.utils.files import atomic_write
from lmfusion.utils.json_files import parse_json_object

SETTINGS_KEY = "lmfusion"
MAX_SETTINGS_BYTES = 1024 * 1024
"""Settings that are longer as JSON in ASCII are neither written nor read."""
MAX_CHUNKS = 65_536
"""Chunks of a file that are searched; Pillow writes one for each 64 KiB of pixels."""

_VIEWER_NAMES = {"num_steps": "Steps", "sampler": "Sampler", "guidance_scale": "CFG scale", "seed": "Seed"}


def save_png(
    path: str | os.PathLike[str], image: Image.Image, settings: Mapping[str, Any], *, overwrite: bool = True
) -> None:
    """Write `image` with `settings` inside, whole or not at all.

    settings: names and JSON values. overwrite: whether an existing file may be replaced.

    Raises ValueError for settings that are not JSON or too long; FileExistsError where `overwrite` is False and the
    file exists, or is being written by another process; other OSErrors with the name of the file.
    """
    path = Path(path)
    text = PngInfo()
    text.add_text(SETTINGS_KEY, _to_json(settings))
    text.add_text("parameters", _for_viewers(settings, image))
    try:
        with atomic_write(path, overwrite) as file:
            image.save(file, format="PNG", pnginfo=text)
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise
        raise OSError(f"cannot write {path}: {error}; free some space or choose another place") from error


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The settings that `save_png` wrote into a file; None for a PNG without any.

    Reads no pixels, and never more than MAX_SETTINGS_BYTES at once. The values may be anything: check them.

    Raises ValueError for a file that is not a PNG or is damaged, and for settings that are too long or not a JSON
    object; OSError for a file that cannot be opened.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
        raise ValueError(f"{path} must be a regular file; give a PNG file")
    with open(path, "rb") as file:
        if file.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
            raise ValueError(f"{path} is not a PNG file")
        text = _find_text(file, str(path))
    if text is None:
        return None
    try:
        return parse_json_object(text, strict=False)
    except ValueError as error:
        raise ValueError(f"the settings in {path} are damaged: {error}") from error


def has_settings(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> bool:
    """Whether `path` is a file by `save_png` with these settings; False for one that is missing or damaged."""
    try:
        return read_settings(path) == settings
    except (ValueError, OSError):
        return False


def _find_text(file: BinaryIO, name: str) -> str | None:
    """The text in the chunk SETTINGS_KEY. file: positioned after PNG's signature."""
    wanted = SETTINGS_KEY.encode() + b"\0"
    for _ in range(MAX_CHUNKS):
        head = file.read(8)
        kind, length = head[4:], int.from_bytes(head[:4], "big")
        if len(head) < 8:
            raise ValueError(f"{name} is damaged or truncated: its end is missing")
        if kind == b"IEND":
            return None
        key = file.read(min(length, len(wanted))) if kind == b"tEXt" else b""
        if key != wanted:
            file.seek(length - len(key) + 4, os.SEEK_CUR)
            continue
        if length - len(key) > MAX_SETTINGS_BYTES:
            raise ValueError(
                f"the settings in {name} must have at most {MAX_SETTINGS_BYTES} bytes, got {length - len(key)}"
            )
        text = file.read(length - len(key))
        if file.read(4) != zlib.crc32(kind + key + text).to_bytes(4, "big"):
            raise ValueError(f"{name} is damaged or truncated: the checksum of its settings is wrong")
        return text.decode("latin-1")
    raise ValueError(f"{name} has more than {MAX_CHUNKS} chunks, and is not searched for settings")


def _to_json(settings: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(dict(settings), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings of an image must be names and JSON values: {error}") from error
    if len(text) > MAX_SETTINGS_BYTES:
        raise ValueError(f"the settings of an image must have at most {MAX_SETTINGS_BYTES} bytes, got {len(text)}")
    return text


def _for_viewers(settings: Mapping[str, Any], image: Image.Image) -> str:
    """The lines that web interfaces for diffusion models use: prompt, negative prompt, `Name: value, ...`"""
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    values = [f"{name}: {settings[key]}" for key, name in _VIEWER_NAMES.items() if key in settings]
    lines.append(", ".join([*values, f"Size: {image.width}x{image.height}"]))
    # NUL would end the text chunk; half a surrogate pair, which a command line can contain, cannot be encoded
    return "\n".join(lines).replace("\0", " ").encode("utf-8", "replace").decode("utf-8")
