"""The image formats that are read: the suffixes of their files and the bytes that the files begin with."""

READ_SUFFIXES = ("jpg", "jpeg", "png", "webp")
"""Suffixes of images that are read, in lower case."""
UNREAD_SUFFIXES = (
    *("apng", "avif", "bmp", "dng", "gif", "heic", "heif", "ico", "j2k", "jfif", "jp2", "jpe", "jxl", "pbm", "pcx"),
    *("pgm", "pnm", "ppm", "psd", "svg", "tga", "tif", "tiff"),
)
"""Suffixes of images that are not read."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"
"""Start of image, and the first byte of the next marker."""
