"""How does an image remember what it was made with? As text in its PNG file, for programs and for viewers.

The chunk "lmfusion" holds the settings as JSON. The chunk "parameters" says the same in the words of other image
generators, which many viewers show.
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
from lmfusion.utils.files import replacing

SETTINGS_KEY = "lmfusion"
MAX_SETTINGS_BYTES = 1024 * 1024
"""Settings that take more, as JSON in ASCII, are neither written nor read."""
MAX_CHUNKS = 65_536
"""Chunks of a file that are looked at; Pillow writes one for each 64 KiB of pixels."""

_VIEWER_NAMES = {"num_steps": "Steps", "sampler": "Sampler", "guidance_scale": "CFG scale", "seed": "Seed"}


def save_png(
    path: str | os.PathLike[str], image: Image.Image, settings: Mapping[str, Any], *, overwrite: bool = True
) -> None:
    """Write `image` with `settings` inside, whole or not at all.

    settings: names and values that JSON knows. overwrite: whether a file that is there may be replaced.

    Raises ValueError for settings that JSON does not know or that are too long; FileExistsError where `overwrite` is
    False and the file is there, or is being written by another process; other OSErrors with the name of the file.
    """
    path = Path(path)
    text = PngInfo()
    text.add_text(SETTINGS_KEY, _to_json(settings))
    text.add_text("parameters", _for_viewers(settings, image))
    try:
        with replacing(path, overwrite) as file:
            image.save(file, format="PNG", pnginfo=text)
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise
        raise OSError(f"cannot write {path}: {error}; free some space or choose another place") from error


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The settings that `save_png` wrote into a file; None for a PNG without any.

    Reads no pixels, and never more than MAX_SETTINGS_BYTES at once. The values are what the file says: check them.

    Raises ValueError for a file that is no PNG or is damaged, and for settings that are too long or no JSON object;
    OSError for a file that cannot be opened.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
        raise ValueError(f"{path} is no regular file; give a PNG file")
    with open(path, "rb") as file:
        if file.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
            raise ValueError(f"{path} is no PNG file")
        text = _find_text(file, str(path))
    if text is None:
        return None
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the settings in {path} are no JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"the settings in {path} are {text[:40]!r}; a JSON object is expected")
    return settings


def holds(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> bool:
    """Whether `save_png` wrote a file with these settings there; False for one that is missing or damaged."""
    try:
        return read_settings(path) == settings
    except (ValueError, OSError):
        return False


def _find_text(file: BinaryIO, name: str) -> str | None:
    """The text of the chunk SETTINGS_KEY in a file that stands behind PNG's signature."""
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
                f"the settings in {name} take {length - len(key)} bytes; at most {MAX_SETTINGS_BYTES} are read"
            )
        text = file.read(length - len(key))
        if file.read(4) != zlib.crc32(kind + key + text).to_bytes(4, "big"):
            raise ValueError(f"{name} is damaged or truncated: its settings have another checksum than they should")
        return text.decode("latin-1")
    raise ValueError(f"{name} has more than {MAX_CHUNKS} chunks; such a file is not searched for settings")


def _to_json(settings: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(dict(settings), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings of an image are names and values that JSON knows: {error}") from error
    if len(text) > MAX_SETTINGS_BYTES:
        raise ValueError(f"the settings of an image take {len(text)} bytes; the limit is {MAX_SETTINGS_BYTES}")
    return text


def _for_viewers(settings: Mapping[str, Any], image: Image.Image) -> str:
    """The lines that web interfaces for diffusion models write and read: prompt, negative prompt, `Name: value, ...`"""
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    values = [f"{name}: {settings[key]}" for key, name in _VIEWER_NAMES.items() if key in settings]
    lines.append(", ".join([*values, f"Size: {image.width}x{image.height}"]))
    # NUL ends a text chunk; half characters, which a command line can hold, are in no encoding
    return "\n".join(lines).replace("\0", " ").encode("utf-8", "replace").decode("utf-8")
