"""Images from anywhere to tensors: safe reading, centre crop and resize."""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from lmfusion.images.containers import TURNS, CostlyImageError, ImageFile, orientation, strip_metadata
from lmfusion.images.formats import FORMATS

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray
"""A JPEG, PNG or WEBP file, a Pillow image, or an array [H, W] or [H, W, 1 | 3 | 4]: uint8, or floating in [0, 1]."""

MAX_PIXELS = 64 * 1024 * 1024
"""Larger images are refused before they are decoded."""
MAX_FILE_BYTES = 256 * 1024 * 1024
"""Larger files are refused before they are read. MAX_PIXELS take this much uncompressed, with transparency."""


def load_image(source: ImageSource) -> Image.Image:
    """`source` as a Pillow image of mode "RGB" or "L" (grey), upright, with transparency laid on white.

    An animation gives its first picture. Raises FileNotFoundError and other OSErrors of the file system as they are;
    ValueError, naming the file, for one that is not a JPEG, PNG or WEBP, is damaged or truncated, has more than
    MAX_PIXELS or MAX_FILE_BYTES, or is not a regular file; ValueError for an array that is not an image.
    """
    if isinstance(source, np.ndarray):
        return _flatten(_from_array(source))
    if isinstance(source, Image.Image):
        with _named("the given image"):
            return _upright(_flatten(source), source)
    name = os.fspath(source)
    status = os.stat(source)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
        raise ValueError(f"{name} must be a regular file; give a JPEG, PNG or WEBP file")
    check_file_size(status.st_size, name)
    with open(source, "rb") as file:
        return decode_image(file.read(MAX_FILE_BYTES), name)


def decode_image(data: bytes, name: str) -> Image.Image:
    """The image that the bytes of a JPEG, PNG or WEBP file hold, as `load_image` gives it.

    name: what errors call it. Raises ValueError where the bytes are not an image, damaged, truncated, or too large.
    """
    with _named(name):
        file = strip_metadata(data)
        with _open(file.data) as image:
            image.load()
            picture = _flatten(image) if file.transparent is None else _without_transparent_colour(image, file)
        turn = orientation(file.exif, file.xmp)
        return picture if turn is None else picture.transpose(turn)


def read_image_size(data: bytes, name: str) -> tuple[int, int]:
    """Width and height of the image in the bytes of a file, before it is turned upright; no pixel is decoded.

    Raises ValueError as `decode_image` does, but not for too many pixels, nor for damage to them.
    """
    with _named(name), Image.open(io.BytesIO(strip_metadata(data).data), formats=FORMATS) as image:
        return image.size


def _open(data: bytes) -> Image.Image:
    """Raises _TooLargeError for more pixels than MAX_PIXELS, and what Pillow does."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise _TooLargeError(f"{image.width} x {image.height} pixels")
    return image


def check_file_size(num_bytes: int, name: str) -> None:
    """Raises ValueError for an image file of more than MAX_FILE_BYTES."""
    if num_bytes > MAX_FILE_BYTES:
        raise ValueError(
            f"{name} is too large to read safely: it must have at most {MAX_FILE_BYTES} bytes, got {num_bytes}; scale "
            "it down"
        )


def to_tensor(source: ImageSource, image_size: int, channels: int = 3) -> Tensor:
    """`source` as float32 [channels, image_size, image_size] in [-1, 1]: centre crop to a square, then resize.

    channels: 3 (RGB) or 1 (grey). An image of that size keeps its pixels. Raises what `load_image` raises.
    """
    image = load_image(source).convert("L" if channels == 1 else "RGB")
    image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).view(image_size, image_size, channels)
    return pixels.permute(2, 0, 1) / 127.5 - 1


def to_pil(images: Tensor) -> list[Image.Image]:
    """Pillow images of a batch [B, 1 | 3, H, W] in [-1, 1]."""
    pixels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    arrays = pixels.permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]


def _upright(picture: Image.Image, source: Image.Image) -> Image.Image:
    """`picture` turned upright by the EXIF of `source`; unchanged where that cannot be read."""
    try:
        turn = TURNS.get(source.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # EXIF may hold anything, and Pillow raises almost anything on it
        turn = None
    return picture if turn is None else picture.transpose(turn)


class _TooLargeError(ValueError):
    pass


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into one ValueError that names the image."""
    try:
        yield
    except (_TooLargeError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name} is too large to read safely ({error}); the limit is {MAX_PIXELS} pixels, scale it down"
        ) from error
    except CostlyImageError as error:
        raise ValueError(f"{name} takes too long to decode: {error}; save it again as an ordinary file") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image of a known format; {', '.join(FORMATS)} are read") from error
    except Exception as error:  # decoders raise almost anything on damaged data
        raise ValueError(f"{name} is damaged or truncated: {error}; replace it or leave it out") from error


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))) or array.size == 0:
        raise ValueError(f"an image array must have shape [H, W] or [H, W, 1 | 3 | 4], got {list(array.shape)}")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise ValueError(
            f"an image array must have at most {MAX_PIXELS} pixels, got {array.shape[0]} x {array.shape[1]}"
        )
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # also false for NaN
            raise ValueError(f"a floating image array must hold values in [0, 1], got {array.min()} to {array.max()}")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"an image array must be uint8, or floating in [0, 1], got {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array))


def _flatten(image: Image.Image) -> Image.Image:
    """Any mode to "RGB" or "L"."""
    transparent = image.info.get("transparency")
    if isinstance(transparent, int | tuple) and image.mode in ("1", "L", "RGB", "I;16"):
        samples = np.asarray(image)
        key = bool(transparent) if image.mode == "1" else transparent
        return _whitened(_to_grey_or_rgb(image), samples == np.array(key))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or transparent is not None:
        return _on_white(image)
    return _to_grey_or_rgb(image)


def _to_grey_or_rgb(image: Image.Image) -> Image.Image:
    """Any mode to "RGB" or "L", ignoring transparency."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _without_transparent_colour(image: Image.Image, file: ImageFile) -> Image.Image:
    """The picture of a PNG with a transparent colour, with white in place of that colour.

    The colour is compared in the file's own bits. Pillow compares it with converted samples: 2 and 4 bits are scaled to
    8, and the 16 bits of a coloured sample are cut to 8.
    """
    assert file.transparent is not None
    samples = np.asarray(image).astype(np.uint16)
    if file.bit_depth < 8:
        samples //= np.uint16(1 if image.mode == "1" else 255 // (2**file.bit_depth - 1))
    elif file.bit_depth == 16 and image.mode == "RGB":
        with _open(file.data) as low:
            # Pillow keeps the upper half of each sample. Read as little endian, that is the lower half.
            low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]  # type: ignore[attr-defined]
            samples = samples << 8 | np.asarray(low)
    key = np.array(file.transparent if image.mode == "RGB" else file.transparent[0], np.uint16)
    return _whitened(_to_grey_or_rgb(image), samples == key)


def _whitened(image: Image.Image, is_equal: np.ndarray) -> Image.Image:
    """`image` with white where all samples of a pixel are equal to a key. is_equal: bool [H, W] or [H, W, 3]"""
    is_transparent = is_equal.all(axis=-1) if is_equal.ndim == 3 else is_equal
    pixels = np.array(image)
    pixels[is_transparent] = 255
    return Image.fromarray(pixels)


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")
