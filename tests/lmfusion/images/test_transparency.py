"""White behind transparent pixels, for every type and depth of PNG, made by hand, and for Pillow's images."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lmfusion.images.preprocessing import decode_image, load_image
from tests.lmfusion.data.storage.stored import chunk, encoded, picture


def pixels(data):
    return np.asarray(decode_image(data, "x").convert("RGB"))


ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def hand_made(samples, depth, colour, *chunks, interlaced=False):
    """A PNG of samples [H, W] or [H, W, channels] of `depth` bits, with each of the five filters."""
    samples = samples.reshape(*samples.shape[:2], -1)
    rows = []
    for x, y, step_x, step_y in ADAM7 if interlaced else ((0, 0, 1, 1),):
        part = samples[y::step_y, x::step_x]
        if part.size:
            rows += filtered(part, depth)
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], depth, colour, 0, 0, interlaced)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(b"".join(rows))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def filtered(samples, depth):
    height, _, channels = samples.shape
    size = max(1, channels * depth // 8)
    before = None
    for y in range(height):
        if depth == 16:
            row = samples[y].astype(">u2").tobytes()
        else:
            bits = np.unpackbits(samples[y].astype(np.uint8).reshape(-1, 1), axis=1)[:, 8 - depth :]
            row = np.packbits(bits.reshape(-1)).tobytes()
        before = bytes(len(row)) if before is None else before
        left, upper_left = bytes(size) + row[:-size], bytes(size) + before[:-size]
        kind = y % 5
        guess = {
            0: lambda a, b, c: 0,
            1: lambda a, b, c: a,
            2: lambda a, b, c: b,
            3: lambda a, b, c: (a + b) // 2,
            4: lambda a, b, c: min((a, b, c), key=lambda value: abs(a + b - c - value)),
        }[kind]
        pieces = zip(row, left, before, upper_left, strict=False)
        yield bytes([kind, *((x - guess(a, b, c)) % 256 for x, a, b, c in pieces)])
        before = row


def to_8_bits(samples, depth, colour):
    if depth == 16:
        return samples // 257 if colour == 0 else samples >> 8  # as they have always been read
    return samples * (255 // (2**depth - 1))


def laid_on_white(image, alpha):
    return np.round(image * (alpha / 255) + 255 * (1 - alpha / 255))


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("colour", "depth"), [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16)])
def test_one_transparent_colour_is_white_at_every_depth(colour, depth, interlaced):
    rng = np.random.default_rng(depth)
    shape = (21, 19) if colour == 0 else (21, 19, 3)
    samples = rng.integers(0, 2**depth, shape)
    key = samples[3, 4].reshape(-1)
    samples[10, ::2] = samples[3, 4]
    if depth == 16:
        samples[12, ::2] = samples[3, 4] ^ 1  # the same upper half: another colour
    is_key = (samples.reshape(21, 19, -1) == key).all(-1)
    assert is_key.sum() > 10
    alpha = b"".join(int(value).to_bytes(2, "big") for value in key)
    expected = to_8_bits(samples, depth, colour)
    data = hand_made(samples, depth, colour, interlaced=interlaced)
    assert np.array_equal(np.asarray(decode_image(data, "x")), expected)
    expected = expected.copy()
    expected[is_key] = 255
    data = hand_made(samples, depth, colour, chunk(b"tRNS", alpha), interlaced=interlaced)
    assert np.array_equal(np.asarray(decode_image(data, "x")), expected)
    if depth < 16:  # bits above the depth do not count
        odd = b"".join((int(value) | 1 << depth).to_bytes(2, "big") for value in key)
        data = hand_made(samples, depth, colour, chunk(b"tRNS", odd), interlaced=interlaced)
        assert np.array_equal(np.asarray(decode_image(data, "x")), expected)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("num_alphas", ["one", "all", "single hole"])
def test_palettes_with_transparent_entries(depth, num_alphas, interlaced):
    rng = np.random.default_rng(depth)
    size = 2**depth
    samples, palette = rng.integers(0, size, (20, 23)), rng.integers(0, 256, (size, 3))
    alphas = {"one": [77], "all": rng.integers(0, 256, size), "single hole": [255] * (size - 1) + [0]}[num_alphas]
    alphas = np.array(alphas)
    chunks = chunk(b"PLTE", bytes(palette.reshape(-1).tolist())), chunk(b"tRNS", bytes(alphas.tolist()))
    data = hand_made(samples, depth, 3, *chunks, interlaced=interlaced)
    alpha = np.concatenate([alphas, np.full(size - len(alphas), 255)])[samples][..., None]
    assert np.abs(pixels(data) - laid_on_white(palette[samples], alpha)).max() <= 1
    opaque = hand_made(samples, depth, 3, chunks[0], interlaced=interlaced)
    assert np.array_equal(pixels(opaque), palette[samples])


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("colour", "depth"), [(4, 8), (4, 16), (6, 8), (6, 16)])
def test_alpha_channels(colour, depth, interlaced):
    rng = np.random.default_rng(depth)
    samples = rng.integers(0, 2**depth, (20, 23, 2 if colour == 4 else 4))
    samples[:9, :, -1], samples[9:14, :, -1] = 0, 2**depth - 1
    data = hand_made(samples, depth, colour, interlaced=interlaced)
    in_8_bits = to_8_bits(samples, depth, colour)
    expected = laid_on_white(in_8_bits[..., :-1], in_8_bits[..., -1:])
    assert np.abs(pixels(data) - expected).max() <= 1
    assert (pixels(data)[:9] == 255).all()


def test_transparency_of_pillow_images():
    deep = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    deep.info["transparency"] = 257
    assert np.asarray(load_image(deep)).tolist() == [[0, 255, 255]]
    two = Image.fromarray(np.array([[True, False]]))
    for key, expected in ((255, [255, 0]), (0, [255, 255])):
        two.info["transparency"] = key
        assert np.asarray(load_image(two)).tolist() == [expected]
    colours = Image.fromarray(np.array([[[1, 2, 3], [1, 2, 4]]], np.uint8))
    colours.info["transparency"] = (1, 2, 3)
    assert np.asarray(load_image(colours)).tolist() == [[[255, 255, 255], [1, 2, 4]]]
    rgba = np.dstack([np.asarray(picture()), np.full((20, 24), 255, np.uint8)])
    rgba[:, :9, 3] = 0
    for kind in ("GIF", "TIFF", "WEBP"):
        with Image.open(io.BytesIO(encoded(kind, Image.fromarray(rgba)))) as image:
            assert (np.asarray(load_image(image))[:, :9] == 255).all(), kind


def test_a_transparent_colour_that_is_cut_off_is_damage():
    samples = np.zeros((4, 4, 3), int)
    with pytest.raises(ValueError, match="its transparent colour is truncated"):
        decode_image(hand_made(samples, 8, 2, chunk(b"tRNS", b"\0\0")), "x")
