"""Removes everything from an image file except the parts that hold its pixels, before a decoder sees the file.

So damaged or huge texts, colour profiles, EXIF and XMP cannot make an image unreadable, and cost neither time nor
memory. Damage in the parts that are kept is an error. EXIF and XMP are returned separately, for `orientation`.
"""

import re
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

from PIL import Image

from lmfusion.images.formats import PNG_SIGNATURE, format_of

MAX_SCANS = 100
"""Scans of a JPEG. Encoders write about ten. Each costs a pass over all pixels, however few bytes it has."""
MAX_SCANNED_PIXELS = MAX_SCANS * 16 * 1024 * 1024
"""Limit of scans times pixels."""
MIN_MAX_SCANS = 25
"""Scans that are allowed at any size: what MAX_SCANNED_PIXELS allows for the largest image that is read."""
MAX_PARTS = 2**16
"""Segments or chunks of a file."""
MAX_METADATA_BYTES = 1024 * 1024
"""Bytes of XMP, unpacked. EXIF has at most 64 KiB in a JPEG."""

_ORIENTATION = 0x0112
_EXIF_HEAD = b"Exif\0\0"
_TIFF_HEADS = (b"MM\0*", b"II*\0", b"MM*\0", b"II\0*", b"MM\0+", b"II+\0")
"""Big and little endian; the others are common mistakes, which are accepted."""
_INTEGER_BYTES = {1: 1, 6: 1, 3: 2, 8: 2, 4: 4, 9: 4, 13: 4}
"""Size of each integer type of EXIF."""
_XMP_HEAD = b"http://ns.adobe.com/xap/1.0/\0"
_PNG_NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_HARMLESS = (
    *(b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"cICP", b"mDCV", b"cLLI", b"sBIT"),
    *(b"bKGD", b"hIST", b"sPLT", b"pHYs", b"tIME", b"acTL", b"fcTL", b"fdAT", b"oFFs", b"pCAL", b"sCAL", b"sTER"),
    *(b"iDOT", b"caBX", b"vpAg", b"orNT"),
)
"""Chunks that may be damaged: no pixel of the first picture depends on them."""
_GREY, _RGB, _PALETTE = 0, 2, 3
_WEBP_NEEDED = (b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L")
_WEBP_METADATA_FLAGS = 0x20 | 0x08 | 0x04
"""Flags of a colour profile, EXIF and XMP."""
_PNG_XMP_KEY = b"XML:com.adobe.xmp"
_PNG_EXIF_KEY = b"Raw profile type exif"
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""Begins a segment: neither data of a scan (FF 00), nor padding (FF FF), nor a marker without a segment."""
_SOF = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
"""Segments that hold height and width."""
_SOS, _EOI, _COM, _APP0, _APP1, _APP14, _APP15 = 0xDA, 0xD9, 0xFE, 0xE0, 0xE1, 0xEE, 0xEF


class CostlyImageError(ValueError):
    """An image that would take a decoder too long."""


class ImageFile(NamedTuple):
    """An image file reduced to what its pixels need."""

    data: bytes
    exif: bytes | None = None
    xmp: bytes | None = None
    transparent: tuple[int, ...] | None = None
    """For a PNG without alpha: the transparent grey value, or red, green and blue, in the file's bit depth."""
    bit_depth: int = 8
    """For a PNG: bits per sample."""


def strip_metadata(data: bytes) -> ImageFile:
    """The parts of a JPEG, PNG or WEBP file that a decoder needs; other files as they are.

    Raises ValueError where a needed part is damaged or missing, and CostlyImageError for too many scans or parts.
    """
    strip = {"JPEG": _strip_jpeg, "PNG": _strip_png, "WEBP": _strip_webp}.get(format_of(data) or "", ImageFile)
    return strip(data)


def orientation(exif: bytes | None, xmp: bytes | None) -> Image.Transpose | None:
    """How to turn a picture upright. None: not at all, or the orientation cannot be read."""
    value = None if exif is None else _exif_orientation(exif)
    if value is None and xmp is not None:
        match = re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)
        value = int(match[1]) if match else None
    return None if value is None else TURNS.get(value)


def _exif_orientation(exif: bytes) -> int | None:
    """The orientation in the first directory of EXIF, the only part that is read; None where there is none."""
    while exif.startswith(_EXIF_HEAD):
        exif = exif[len(_EXIF_HEAD) :]
    if exif[:4] not in _TIFF_HEADS:
        return None
    order: Literal["big", "little"] = "big" if exif[:2] == b"MM" else "little"
    start = int.from_bytes(exif[4:8], order)
    found = None
    for i in range(int.from_bytes(exif[start : start + 2], order)):
        entry = exif[start + 2 + 12 * i : start + 14 + 12 * i]
        size = _INTEGER_BYTES.get(int.from_bytes(entry[2:4], order))
        is_single = int.from_bytes(entry[4:8], order) == 1
        if len(entry) == 12 and int.from_bytes(entry[:2], order) == _ORIENTATION and size and is_single:
            found = int.from_bytes(entry[8 : 8 + size], order)
        elif len(entry) < 12:
            break
    return found


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# JPEG


def _strip_jpeg(data: bytes) -> ImageFile:
    """Raises ValueError where there is no scan, CostlyImageError where there are too many."""
    kept, exif, xmp = [data[:2]], b"", None
    num_scans = end_of_kept = 0
    most_scans = MAX_SCANS
    for kind, begin, end in _jpeg_segments(data):
        if num_scans:
            kept.append(data[end_of_kept:begin])  # data of a scan; before the first there is only padding
        content = data[begin + 4 : end]
        if kind == _SOS:
            num_scans += 1
            if num_scans > most_scans:
                raise CostlyImageError(f"more than {most_scans} scans")
        elif kind in _SOF:
            num_pixels = int.from_bytes(content[1:3], "big") * int.from_bytes(content[3:5], "big")
            most_scans = min(most_scans, max(MIN_MAX_SCANS, MAX_SCANNED_PIXELS // max(1, num_pixels)))
        if not (_APP0 <= kind <= _APP15 or kind == _COM) or _is_colour_segment(kind, content):
            kept.append(data[begin:end])
        elif kind == _APP1 and content.startswith(_EXIF_HEAD):
            exif += content[len(_EXIF_HEAD) :]
        elif kind == _APP1 and content.startswith(_XMP_HEAD):
            xmp = content[len(_XMP_HEAD) :]
        end_of_kept = end if kind != _EOI else len(data)  # anything after it is not part of the picture
    if not num_scans:
        raise ValueError("its end is missing")
    kept.append(data[end_of_kept:])
    return ImageFile(b"".join(kept), exif or None, xmp)


def _is_colour_segment(kind: int, content: bytes) -> bool:
    """Whether a segment is one of the two that define colours (JFIF, Adobe), and long enough to be read."""
    is_jfif = kind == _APP0 and content.startswith(b"JFIF\0") and len(content) >= 14
    return is_jfif or (kind == _APP14 and content.startswith(b"Adobe") and len(content) >= 12)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(kind, first byte, end) of every segment up to and including the end mark. Data of scans are between segments.

    Markers are found as libjpeg finds them: bytes between segments that are not markers are skipped.
    """
    position = 2
    for _ in range(MAX_PARTS):
        match = _JPEG_MARKER.search(data, position)
        if match is None:
            return  # the decoder reports what is missing
        begin, kind = match.start(), data[match.start() + 1]
        if kind == _EOI:
            yield kind, begin, begin + 2
            return
        length = int.from_bytes(data[begin + 2 : begin + 4], "big")
        if begin + 4 > len(data) or length < 2:
            return
        position = begin + 2 + length
        yield kind, begin, position
    raise CostlyImageError(f"more than {MAX_PARTS} segments")


# PNG


def _strip_png(data: bytes) -> ImageFile:
    """Raises ValueError where the end is missing, or a part that the pixels need has a wrong checksum.

    Pillow would not notice: it stops reading once all lines are filled, even with the zeros of an unfinished download,
    and skips the checksums of the pixels.
    """
    needed: dict[bytes, list[memoryview]] = {kind: [] for kind in _PNG_NEEDED}
    exif, xmp = None, None
    for kind, content, is_whole in _png_chunks(data):
        if kind in needed:
            needed[kind].append(content)
        elif not is_whole:  # a damaged chunk of _PNG_HARMLESS
            continue
        elif kind == b"eXIf":
            exif = bytes(content)
        elif kind in _PNG_TEXTS:
            key, _, text = bytes(content[: 2 * MAX_METADATA_BYTES]).partition(b"\0")
            if key == _PNG_XMP_KEY and kind == b"iTXt":
                xmp = _international_text(text)
            elif key == _PNG_EXIF_KEY and exif is None:
                exif = _raw_profile(text if kind == b"tEXt" else _unpacked(text[1:]))
    headers, palettes, alphas = needed[b"IHDR"], needed[b"PLTE"], needed[b"tRNS"]
    if len(headers) != 1 or len(headers[0]) != 13 or len(palettes) > 1 or len(alphas) > 1:
        raise ValueError("a chunk is missing or present twice")
    depth, colour = headers[0][8], headers[0][9]
    is_palette = colour == _PALETTE
    whole = b"".join(
        [
            PNG_SIGNATURE,
            *_png_chunk(b"IHDR", headers),
            *(_png_chunk(b"PLTE", palettes) if palettes and is_palette else ()),
            *(_png_chunk(b"tRNS", alphas) if alphas and is_palette else ()),
            *_png_chunk(b"IDAT", needed[b"IDAT"]),
            *_png_chunk(b"IEND", []),
        ]
    )
    transparent = _transparent(bytes(alphas[0]), depth, colour) if alphas else None
    return ImageFile(whole, exif, xmp, transparent, depth)


def _transparent(alpha: bytes, depth: int, colour: int) -> tuple[int, ...] | None:
    """The transparent colour of a PNG without alpha. Of the 16 bits of each sample, the lowest `depth` count."""
    num_samples = {_GREY: 1, _RGB: 3}.get(colour)
    if num_samples is None:
        return None
    if len(alpha) < 2 * num_samples:
        raise ValueError("its transparent colour is truncated")
    return tuple(int.from_bytes(alpha[2 * i : 2 * i + 2], "big") & ((1 << depth) - 1) for i in range(num_samples))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview, bool]]:
    """(kind, content, whether its checksum is right) of every chunk up to the end mark.

    Raises ValueError for a wrong checksum where the chunk may matter.
    """
    view, start = memoryview(data), len(PNG_SIGNATURE)
    for _ in range(MAX_PARTS):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if end > len(data):
            raise ValueError("its end is missing")
        kind = data[start + 4 : start + 8]
        is_whole = zlib.crc32(view[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
        if not is_whole and kind not in _PNG_HARMLESS:
            raise ValueError(f"the checksum of its chunk at byte {start} is wrong")
        if kind == b"IEND":
            return
        is_critical = not kind[0] & 0x20  # a capital first letter marks what a decoder must understand
        if is_critical and kind not in _PNG_NEEDED:
            raise ValueError(f"its chunk {kind.decode('ascii', 'backslashreplace')} is unknown")
        yield kind, view[start + 8 : end - 4], is_whole
        start = end
    raise CostlyImageError(f"more than {MAX_PARTS} chunks")


def _png_chunk(kind: bytes, content: list[memoryview]) -> list[bytes | memoryview]:
    """A chunk, in pieces, whose content is that of `content` joined."""
    checksum = zlib.crc32(kind)
    for piece in content:
        checksum = zlib.crc32(piece, checksum)
    return [sum(map(len, content)).to_bytes(4, "big"), kind, *content, checksum.to_bytes(4, "big")]


def _international_text(content: bytes) -> bytes | None:
    """The text in an iTXt chunk. content: the chunk after the keyword."""
    is_packed, fields = content[:1] == b"\1", content[2:].split(b"\0", 2)
    if len(fields) < 3:
        return None
    return _unpacked(fields[2]) if is_packed else fields[2]


def _raw_profile(text: bytes) -> bytes | None:
    """EXIF that ImageMagick writes as text: a name, a length, and lines of hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return None


def _unpacked(data: bytes) -> bytes:
    """At most MAX_METADATA_BYTES of the unpacked data; nothing where it is damaged."""
    try:
        return zlib.decompressobj().decompress(data, MAX_METADATA_BYTES)
    except zlib.error:
        return b""


# WEBP


def _strip_webp(data: bytes) -> ImageFile:
    """Raises ValueError where a part of the picture is missing."""
    kept: list[bytes] = []
    found: dict[bytes, bytes] = {}
    for kind, content in _webp_chunks(data):
        if kind == b"VP8X" and content:
            content = bytes([content[0] & ~_WEBP_METADATA_FLAGS]) + content[1:]
        if kind in _WEBP_NEEDED:
            kept += [kind, len(content).to_bytes(4, "little"), content, b"\0" * (len(content) % 2)]
        elif kind in (b"EXIF", b"XMP "):
            found.setdefault(kind, content)
    body = b"WEBP" + b"".join(kept)
    whole = b"RIFF" + len(body).to_bytes(4, "little") + body
    return ImageFile(whole, found.get(b"EXIF"), found.get(b"XMP "))


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, content) of every chunk. A truncated chunk after the picture is left out."""
    start = 12
    for _ in range(MAX_PARTS):
        kind, size = data[start : start + 4], int.from_bytes(data[start + 4 : start + 8], "little")
        end = start + 8 + size + size % 2
        if end > len(data):
            if kind in _WEBP_NEEDED:
                raise ValueError("its end is missing")
            return
        if start + 8 > len(data):
            return
        yield kind, data[start + 8 : start + 8 + size]
        start = end
    raise CostlyImageError(f"more than {MAX_PARTS} chunks")
