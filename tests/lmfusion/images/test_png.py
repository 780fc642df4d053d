"""Settings inside PNG files: Pillow and we read what was written; a hostile file costs neither time nor memory."""

import json
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from lmfusion.images import png
from lmfusion.images.png import MAX_SETTINGS_BYTES, read_settings, save_png
from lmfusion.images.preprocessing import load_image

SETTINGS = {
    "prompt": 'a "seven"\nin 漢字, ünd \udc80\0',
    "negative_prompt": "blurry",
    "seed": 2**63,
    "num_steps": 20,
    "sampler": "dpm-solver",
    "guidance_scale": 1.55,
    "guidance_interval": [0.0, 1.0],
    "image_size": None,
}


@pytest.fixture
def picture():
    return Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(*chunks):
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_reads_what_was_saved(picture, tmp_path, mode):
    save_png(tmp_path / "a.png", picture.convert(mode), SETTINGS)
    assert read_settings(tmp_path / "a.png") == SETTINGS
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png")), np.asarray(picture.convert(mode)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_pillow_shows_the_settings(picture, tmp_path):
    save_png(tmp_path / "a.png", picture, SETTINGS)
    with Image.open(tmp_path / "a.png") as image:
        assert json.loads(image.text["lmfusion"]) == SETTINGS
        lines = image.text["parameters"].splitlines()
        assert lines[0] == 'a "seven"' and lines[1] == "in 漢字, ünd ? "
        assert lines[2:] == [
            "Negative prompt: blurry",
            f"Steps: 20, Sampler: dpm-solver, CFG scale: 1.55, Seed: {2**63}, Size: 4x4",
        ]


def test_a_png_without_settings_has_none(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    assert read_settings(tmp_path / "a.png") is None


def test_settings_behind_the_pixels_are_found(tmp_path):
    (tmp_path / "a.png").write_bytes(png_of(chunk(b"IDAT", b"x" * 99), chunk(b"tEXt", b'lmfusion\0{"seed": 1}')))
    assert read_settings(tmp_path / "a.png") == {"seed": 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GIF89a", "is not a PNG file"),
        (png_of()[:-8], "its end is missing"),
        (png_of(chunk(b"tEXt", b"lmfusion\0{")), "the settings in .* are damaged"),
        (png_of(chunk(b"tEXt", b"lmfusion\0" + b"[" * 200_000)), "the settings in .* are damaged"),
        (png_of(chunk(b"tEXt", b"lmfusion\0" + b"9" * 200_000)), "the settings in .* are damaged"),
        (png_of(chunk(b"tEXt", b"lmfusion\0[1]")), "must hold a JSON object, got list"),
        (png_of(chunk(b"tEXt", b"lmfusion\0{}")[:-4] + b"1234"), "the checksum of its settings is wrong"),
        (png_of(chunk(b"tEXt", b"lmfusion\0" + b" " * (MAX_SETTINGS_BYTES + 1))), "must have at most 1048576 bytes"),
    ],
)
def test_damaged_files_are_named(tmp_path, data, message):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_settings(tmp_path / "a.png")
    assert str(tmp_path / "a.png") in str(error.value)


def test_no_chunk_is_read_because_it_says_so(tmp_path):
    """A file that announces gigabytes costs neither memory nor time."""
    path = tmp_path / "a.png"
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 2**31 - 1) + b"tEXtcomment\0")
        file.seek(2**31 + 19)  # behind its end, over a hole
        file.write(struct.pack(">I", 2**31 - 1) + b"tEXtlmfusion\0")
    tracemalloc.start()
    with pytest.raises(ValueError, match="must have at most 1048576 bytes, got 2147483638"):
        read_settings(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_file_of_chunks_alone_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(png, "MAX_CHUNKS", 100)
    (tmp_path / "a.png").write_bytes(png_of(*[chunk(b"tEXt", b"")] * 100))
    with pytest.raises(ValueError, match="more than 100 chunks"):
        read_settings(tmp_path / "a.png")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="must be a regular file"):
        read_settings(tmp_path / "a.png")


@pytest.mark.parametrize("settings", [{"x": float("nan")}, {"x": object()}])
def test_settings_that_json_does_not_know(picture, tmp_path, settings):
    with pytest.raises(ValueError, match="must be names and JSON values"):
        save_png(tmp_path / "a.png", picture, settings)
    assert not list(tmp_path.iterdir())


def test_settings_that_are_too_long(picture, tmp_path):
    with pytest.raises(ValueError, match="must have at most 1048576 bytes, got"):
        save_png(tmp_path / "a.png", picture, {"prompt": "x" * MAX_SETTINGS_BYTES})


def test_a_failure_keeps_the_old_file(picture, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"old")

    def no_space(self, file, format, pnginfo):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", no_space)
    with pytest.raises(OSError, match=r"cannot write .*a\.png: .*No space left on device"):
        save_png(tmp_path / "a.png", picture, {})
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.png", b"old")]


def test_overwrite(picture, tmp_path):
    save_png(tmp_path / "a.png", picture, {"seed": 1})
    with pytest.raises(FileExistsError, match="exists already"):
        save_png(tmp_path / "a.png", picture, {"seed": 2}, overwrite=False)
    assert read_settings(tmp_path / "a.png") == {"seed": 1}
    save_png(tmp_path / "a.png", picture, {"seed": 3})
    assert read_settings(tmp_path / "a.png") == {"seed": 3}
    save_png(tmp_path / "b.png", picture, {"seed": 4}, overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_another_process_that_writes_the_file_is_not_disturbed(picture, tmp_path):
    (tmp_path / "a.png.partial").write_bytes(b"theirs")
    with pytest.raises(FileExistsError):
        save_png(tmp_path / "a.png", picture, {}, overwrite=False)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.png.partial", b"theirs")]
