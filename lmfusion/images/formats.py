"""The image formats that are read: their names, file suffixes and signatures."""

FORMATS = ("JPEG", "PNG", "WEBP")
"""By Pillow's names. Pillow knows many more, whose decoders are less hardened."""
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
"""Of files in these formats, in lower case."""
UNREAD_SUFFIXES = (
    *("apng", "avif", "bmp", "dng", "gif", "heic", "heif", "ico", "j2k", "jfif", "jp2", "jpe", "jxl", "pbm", "pcx"),
    *("pgm", "pnm", "ppm", "psd", "svg", "tga", "tif", "tiff"),
)
"""Of images in other formats."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"


def format_of(data: bytes) -> str | None:
    """Which of `FORMATS` a file is in by its first 12 bytes; None: another."""
    if data.startswith(_JPEG_SIGNATURE):
        return "JPEG"
    if data.startswith(PNG_SIGNATURE):
        return "PNG"
    return "WEBP" if data.startswith(b"RIFF") and data[8:12] == b"WEBP" else None
