"""Images from any source become the same tensors; errors name the images that cannot be read safely."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from lmfusion.images import preprocessing
from lmfusion.images.preprocessing import load_image, to_pil, to_tensor


def gradient(height=12, width=20):
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 255 // height, x * 255 // width, (x + y) * 4], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_files_and_arrays_agree(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(gradient()).save(path, lossless=True, quality=100)
    read = np.asarray(load_image(path)).astype(int)
    assert np.abs(read - gradient()).max() <= (12 if suffix == "jpg" else 0)
    torch.testing.assert_close(to_tensor(str(path), 8), to_tensor(read.astype(np.uint8), 8))


def test_values_and_shape():
    black_and_white = np.array([[0, 255], [255, 0]], np.uint8)
    assert to_tensor(black_and_white, 2, channels=1).tolist() == [[[-1, 1], [1, -1]]]
    assert to_tensor(black_and_white, 2).shape == (3, 2, 2)
    assert to_tensor(gradient(), 8).dtype == torch.float32
    torch.testing.assert_close(to_tensor(black_and_white / 255.0, 2), to_tensor(black_and_white, 2))
    grey = to_tensor(gradient(8, 8), 8, channels=1)
    torch.testing.assert_close(grey[0], to_tensor(np.asarray(Image.fromarray(gradient(8, 8)).convert("L")), 8)[0])


def test_crop_takes_the_middle_without_stretching():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = gradient(8, 8)
    torch.testing.assert_close(to_tensor(wide, 8), to_tensor(gradient(8, 8), 8))
    torch.testing.assert_close(to_tensor(wide.swapaxes(0, 1), 8), to_tensor(gradient(8, 8).swapaxes(0, 1), 8))


def test_to_pil_inverts_to_tensor():
    pixels = gradient(8, 8)
    np.testing.assert_array_equal(np.asarray(to_pil(to_tensor(pixels, 8)[None])[0]), pixels)
    grey = to_pil(to_tensor(pixels, 8, channels=1)[None] * 5)[0]  # beyond the range is clipped
    assert grey.mode == "L" and np.asarray(grey).max() == 255


def test_exif_orientation_is_applied(tmp_path):
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(gradient()).save(path, exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(path)), np.rot90(gradient(), -1))


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.concatenate([gradient(), np.full((12, 20, 1), 255, np.uint8)], axis=-1)
    rgba[:, :10, 3] = 0
    expected = gradient()
    expected[:, :10] = 255
    np.testing.assert_array_equal(np.asarray(load_image(rgba)), expected)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png")), expected)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "p.png", transparency=0)
    assert (np.asarray(load_image(tmp_path / "p.png")) == 255).all()


def test_all_modes_become_rgb_or_grey(tmp_path):
    image = Image.fromarray(gradient())
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"):
        assert load_image(image.convert(mode)).mode in ("L", "RGB"), mode
    deep = np.array([[0, 257, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.asarray(load_image(tmp_path / "deep.png")).tolist() == [[0, 1, 255]]


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_truncated_files_are_named(tmp_path, suffix):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, {"jpg": "jpeg"}.get(suffix, suffix))
    path = tmp_path / f"half.{suffix}"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(ValueError, match=rf"half.{suffix} is (damaged|not an image)"):
        load_image(path)


def test_corrupted_pixels_are_named(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(gradient()).save(buffer, "png")
    damaged = bytearray(buffer.getvalue())
    damaged[len(damaged) // 2] ^= 0xFF
    path = tmp_path / "flipped.png"
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"flipped.png is damaged"):
        load_image(path)


def test_huge_image_is_refused_before_it_is_decoded(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path = tmp_path / "bomb.png"
    for side in (9_000, 60_000):  # Pillow itself warns of neither the first nor refuses it
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
        with pytest.raises(ValueError, match=r"bomb.png is too large"):
            load_image(path)


@pytest.mark.parametrize("kind", ["gif", "bmp", "tiff", "ppm"])
def test_other_formats_are_refused(tmp_path, kind):
    path = tmp_path / "image.png"  # the content counts, not the name
    Image.fromarray(gradient()).save(path, kind)
    with pytest.raises(ValueError, match=r"image.png is not an image of a known format"):
        load_image(path)


@pytest.mark.parametrize("content", [b"", b"no image at all"])
def test_files_without_image_are_named(tmp_path, content):
    path = tmp_path / "notes.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes.png is not an image"):
        load_image(path)


def test_missing_file_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.png"):
        load_image(tmp_path / "nowhere.png")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), "shape"),
        (np.zeros((0, 4), np.uint8), "shape"),
        (np.zeros(4, np.uint8), "shape"),
        (np.zeros((4, 4), np.int32), "int32"),
        (np.full((4, 4), 1.5), r"\[0, 1\]"),
        (np.full((4, 4), np.nan), r"\[0, 1\]"),
    ],
)
def test_arrays_that_are_no_images_are_named(array, message):
    with pytest.raises(ValueError, match=message):
        load_image(array)


def test_large_arrays_are_refused(monkeypatch):
    monkeypatch.setattr(preprocessing, "MAX_PIXELS", 10)
    with pytest.raises(ValueError, match=r"at most 10 pixels"):
        load_image(np.zeros((4, 4), np.uint8))
