"""What the tests of files share: images as bytes, tars, and what is wrong with the samples of a source."""

import io
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image

SUFFIX_OF = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def picture(seed=0, size=(24, 20)):
    """A picture [height, width, 3] with detail, another one a seed."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = rng.integers(-12, 13, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(smooth).astype(int) + noise).clip(0, 255).astype(np.uint8))


def encoded(kind="JPEG", image=None, **options):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    (picture() if image is None else image).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, data, checksum=None):
    """A chunk of a PNG, with its own checksum or another one."""
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def tar_bytes(members, kind=tarfile.GNU_FORMAT):
    """A tar of (name, bytes) in their order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pairs(first, last):
    """Members of captioned images 0007.jpg, 0007.txt, ..."""
    return [
        member
        for i in range(first, last)
        for member in ((f"{i:04d}.jpg", encoded(image=picture(i))), (f"{i:04d}.txt", f"picture {i}".encode()))
    ]


def problems(source):
    """Of every damaged sample of a source, by index, what is wrong with it; the others are loaded."""
    found = {}
    for index in range(len(source)):
        try:
            sample = source[index]
            for load_image in [p for p in getattr(sample, "parts", ()) if callable(p)] or [sample.load_image]:
                assert load_image().mode in ("RGB", "L")
        except (ValueError, OSError) as error:
            found[index] = str(error)
    return found


def equal(image, data):
    """Whether an image has the pixels that Pillow reads from the bytes of a file."""
    return np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
