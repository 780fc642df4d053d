"""A thousand files broken in many ways, through every source: a clear error or a counted skip, no crash, no change."""

import io
import json
import struct
import zlib
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageOps

from lmfusion.data import SourceConfig, load_source
from lmfusion.data.inspect import by_reason, read_all
from lmfusion.data.pipeline.loader import LoaderState
from lmfusion.data.pipeline.skip_log import SkipLog
from lmfusion.images.preprocessing import load_image
from tests.lmfusion.data.pipeline.loaders import packed_loader
from tests.lmfusion.data.storage.stored import SUFFIX_OF, encoded, pairs, picture, problems, tar_bytes

THUMBNAIL = encoded("JPEG", picture(9, (8, 8)))
WHOLE = {
    "jpeg": encoded("JPEG"),
    "progressive": encoded("JPEG", progressive=True, quality=90),
    "thumbnail": b"\xff\xd8\xff\xe2" + struct.pack(">H", 2 + len(THUMBNAIL)) + THUMBNAIL + encoded("JPEG")[2:],
    "grey": encoded("JPEG", picture(1).convert("L")),
    "cmyk": encoded("JPEG", picture(2).convert("CMYK")),
    "png": encoded("PNG", picture(3, (12, 9))),
    "palette": encoded("PNG", picture(4).quantize(16)),
    "webp": encoded("WEBP", picture(5)),
    "lossless": encoded("WEBP", picture(6, (12, 9)), lossless=True),
}


class Case(NamedTuple):
    """A file, and what reading it must give."""

    name: str
    data: bytes
    outcome: str
    """"image", "error", or "either"."""
    pixels: np.ndarray | None = None
    """What an image must be. None: any picture, where the format has no means to notice the damage."""


def pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def suffix_of(data):
    return {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}[data[:2]]


def truncated():
    for name, data in WHOLE.items():
        yield Case(f"{name}-whole.{suffix_of(data)}", data, "image", pixels(data))
        for size in range(0, len(data), 8):
            yield Case(f"{name}-first-{size}.{suffix_of(data)}", data[:size], "error")


def with_zeros_at_the_end():
    """As a download leaves it that was given its full length beforehand."""
    for name in ("jpeg", "progressive", "thumbnail", "png", "palette"):
        data = WHOLE[name]
        for size in range(2, len(data) - 12, 16):
            yield Case(f"{name}-zeros-{size}.{suffix_of(data)}", data[:size] + bytes(len(data) - size), "error")


def with_holes():
    """Zeros in the middle: a block that was never written."""
    for name in ("jpeg", "png", "palette"):
        data = WHOLE[name]
        for start in range(8, len(data) - 24, 16):
            outcome = "either" if name == "jpeg" else "error"
            yield Case(f"{name}-hole-{start}.{suffix_of(data)}", data[:start] + bytes(12) + data[start + 12 :], outcome)


def with_changed_bytes():
    """PNG has checksums; in the others a change that still decodes cannot be told from another picture."""
    rng = np.random.default_rng(0)
    for name, data in WHOLE.items():
        for i in range(40):
            changed = bytearray(data)
            changed[int(rng.integers(len(data)))] ^= int(rng.integers(1, 256))
            expected = pixels(data) if name in ("png", "palette") else None
            yield Case(f"{name}-changed-{i}.{suffix_of(data)}", bytes(changed), "either", expected)


def png(width, height, *chunks):
    """A PNG of such a header and further chunks (kind, bytes)."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


def foreign():
    for kind in ("GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "PDF", "EPS", "JPEG2000", "DDS", "PCX", "SGI"):
        yield Case(f"{kind.lower()}.jpg", encoded(kind), "error")
    texts = {
        "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "xml": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "empty": b"",
        "one-byte": b"\xff",
        "zeros": bytes(4096),
        "noise": np.random.default_rng(1).bytes(4096),
        "only-signature": b"\x89PNG\r\n\x1a\n",
        "riff-of-sound": b"RIFF" + struct.pack("<I", 100) + b"WAVEfmt " + bytes(100),
    }
    yield from (Case(f"{name}.jpg", data, "error") for name, data in texts.items())
    bomb = zlib.compress(bytes(30_000_000))
    yield Case("huge.png", png(60_000, 60_000, (b"IDAT", zlib.compress(b""))), "error")
    yield Case("large.png", png(9_000, 9_000, (b"IDAT", zlib.compress(b""))), "error")
    yield Case("no-pixels.png", png(0, 9, (b"IDAT", zlib.compress(b""))), "error")
    black = np.zeros((4, 4, 3), np.uint8)  # no text is needed for the picture
    data = png(4, 4, (b"zTXt", b"x\0\0" + bomb), (b"IDAT", zlib.compress(bytes(52))))
    yield Case("bomb-text.png", data, "image", black)
    yield Case("short-rows.png", png(4, 4, (b"IDAT", zlib.compress(bytes(20)))), "error")


def unusual():
    """Whole images that a careless reader gets wrong."""
    image = picture(7)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(kind, image, exif=exif)
        yield Case(f"turned.{SUFFIX_OF[kind]}", data, "image", np.rot90(pixels_unturned(data), -1))
    rgba = np.dstack([np.asarray(image), np.full((20, 24), 255, np.uint8)])
    rgba[:, :9, 3] = 0
    on_white = np.asarray(image).copy()
    on_white[:, :9] = 255
    transparent = Image.fromarray(rgba)
    yield Case("alpha.png", encoded("PNG", transparent), "image", on_white)
    yield Case("alpha.webp", encoded("WEBP", transparent, lossless=True, exact=True), "image", on_white)
    deep = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    yield Case("deep.png", encoded("PNG", deep), "image", np.repeat(np.array([[[0], [1], [255]]], np.uint8), 3, -1))
    moving = io.BytesIO()
    image.save(moving, "WEBP", save_all=True, append_images=[picture(8), picture(9)], lossless=True)
    yield Case("moving.webp", moving.getvalue(), "image", np.asarray(image))
    moving = io.BytesIO()
    image.save(moving, "PNG", save_all=True, append_images=[picture(8), picture(9)])
    yield Case("moving.png", moving.getvalue(), "image", np.asarray(image))
    grey = picture(1).convert("L")
    for mode in ("1", "LA", "L"):
        expected = np.repeat(np.asarray(grey.convert(mode).convert("L"))[..., None], 3, -1)
        yield Case(f"mode-{mode}.png", encoded("PNG", grey.convert(mode)), "image", expected)
    yield Case("png-called.jpg", WHOLE["png"], "image", pixels(WHOLE["png"]))
    yield Case("with-more-behind.jpg", WHOLE["jpeg"] + b"\xff\xda of a film", "image", pixels(WHOLE["jpeg"]))
    yield Case("one-pixel.png", encoded("PNG", picture(1, (1, 1))), "image", np.asarray(picture(1, (1, 1))))
    yield Case("very-wide.png", encoded("PNG", picture(1, (3000, 1))), "image", np.asarray(picture(1, (3000, 1))))


def pixels_unturned(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


CASES = [*truncated(), *with_zeros_at_the_end(), *with_holes(), *with_changed_bytes(), *foreign(), *unusual()]


def outcome(load):
    """Pixels, or the one line that tells what is wrong."""
    try:
        return np.asarray(load().convert("RGB"))
    except (ValueError, OSError) as error:
        return str(error)


def check(case, found, name):
    if isinstance(found, str):
        assert name in found and len(found) < 400 and "\n" not in found, (case.name, found)
        assert case.outcome != "image", f"{case.name} was refused: {found}"
    else:
        assert case.outcome != "error", f"{case.name} was read"
        assert case.pixels is None or np.array_equal(found, case.pixels), f"{case.name} has other pixels"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same thousand files in a folder, a tar, a parquet file and as documents."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("broken")
    (folder / "files").mkdir()
    for case in CASES:
        (folder / "files" / case.name).write_bytes(case.data)
    captions = [f"file {i}" for i in range(len(CASES))]
    lines = [{"file_name": case.name, "text": caption} for case, caption in zip(CASES, captions, strict=True)]
    (folder / "files" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    members = [(f"{i:04d}.{suffix}", data) for i, case in enumerate(CASES) for suffix, data in member_data(i, case)]
    (folder / "a.tar").write_bytes(tar_bytes(members))
    table = pa.table({"image": [case.data for case in CASES], "caption": captions})
    pq.write_table(table, folder / "a.parquet", row_group_size=100)
    documents = [{"id": case.name, "content": ["Look:", {"image": f"files/{case.name}"}]} for case in CASES]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, documents)))
    paths = {"folder": "files", "webdataset": "a.tar", "parquet": "a.parquet", "interleaved": "a.jsonl"}
    return [SourceConfig(kind, str(folder / path)) for kind, path in paths.items()]


def member_data(i, case):
    return (case.name.rpartition(".")[2], case.data), ("txt", f"file {i}".encode())


def test_there_are_a_thousand_of_them():
    assert len(CASES) >= 1000 and len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("number", range(4), ids=["folder", "webdataset", "parquet", "interleaved"])
def test_every_file_is_right_or_named(sources, number):
    source = load_source(sources[number], 8)
    assert len(source) == len(CASES)
    by_name = {case.name: case for case in CASES}
    num_damaged = 0
    for index in range(len(source)):
        sample = source[index]
        name = sample.sample_id.rpartition("/")[2]
        case = by_name.get(name) or CASES[int(name)]
        load = sample.load_image if number < 3 else sample.parts[1]
        found = outcome(load)
        num_damaged += isinstance(found, str)
        check(case, found, name)
    assert num_damaged >= sum(case.outcome == "error" for case in CASES) > 700
    contents = read_all(source, "all", load_images=True, num_workers=3)
    assert len(contents.damaged) == num_damaged and contents.num_samples == len(CASES)
    assert contents.num_images == len(CASES) - num_damaged
    assert len(by_reason(contents.damaged)) < 30  # a table that can be read


@pytest.mark.parametrize("number", range(4), ids=["folder", "webdataset", "parquet", "interleaved"])
def test_rows_hold_what_is_whole_and_name_the_rest(sources, number, tokenizer, monkeypatch, tmp_path):
    source = load_source(sources[number], 8)
    names = {source[i].sample_id for i in range(len(source))}
    broken = {damage.sample_id for damage in read_all(source, "all", load_images=True, num_workers=1).damaged}
    options = dict(seq_len=512, pack_window=len(CASES), max_damaged=1.0, num_workers=2, sequences_per_step=8)
    loader = packed_loader(tokenizer, sources=[source], monkeypatch=monkeypatch, **options)
    read, damaged, steps = [], [], []
    for step in loader.steps(LoaderState(), 1000):
        steps.append(step)
        read += [name for row in step.batches for name in row.sample_ids]
        damaged += step.damaged
        assert all(np.isfinite(row.latents.numpy()).all() for row in step.batches)
        if step.state.window > 0:
            break
    assert set(read) == names - broken and {d.sample_id for d in damaged} == broken
    log = SkipLog(tmp_path / "damaged.jsonl", max_damaged=0.5)
    with pytest.raises(ValueError, match=r"at most data.max_damaged, 0.5, got "):  # noqa: PT012
        for number_of_step, step in enumerate(steps):
            log.add(number_of_step, step.num_samples, step.damaged)


# Containers


def test_tars_with_changed_bytes(tmp_path):
    members = [
        (name.replace("jpg", "png"), encoded("PNG", picture(i, (6, 5)))) for i, (name, _) in enumerate(pairs(0, 6))
    ]
    members = [(n, d) if n.endswith("png") else (n, b"a caption") for n, d in members]
    whole = tar_bytes(members)[: 24 * 512]
    truth = {f"a.tar/{i:04d}": pixels(members[2 * i][1]) for i in range(6)}
    rng = np.random.default_rng(0)
    path = tmp_path / "a.tar"
    for trial in range(150):
        data = bytearray(whole)
        kind, at = trial % 3, int(rng.integers(len(data)))
        if kind == 0:
            data[at] ^= int(rng.integers(1, 256))
        elif kind == 1:
            del data[at : at + int(rng.integers(1, 2000))]
        else:
            data[at : at + 512] = rng.bytes(len(data[at : at + 512]))
        path.write_bytes(data)
        try:
            source = load_source(SourceConfig("webdataset", str(path)), 8)
        except ValueError:
            continue
        found = problems(source)
        good = [source[i] for i in range(len(source)) if i not in found]
        for sample in good:
            if sample.sample_id in truth:
                assert np.array_equal(np.asarray(sample.load_image().convert("RGB")), truth[sample.sample_id])
        assert len(good) == 6 or found, trial  # nothing is missing without a word


def changed(whole, rng, is_altered, most_lost):
    """`whole` with one byte altered, or up to `most_lost` of them missing."""
    data = bytearray(whole)
    at = int(rng.integers(len(data)))
    if is_altered:
        data[at] ^= int(rng.integers(1, 256))
    else:
        del data[at : at + int(rng.integers(1, most_lost))]
    return bytes(data)


def test_parquet_files_with_changed_bytes(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [encoded("PNG", picture(i, (6, 5))) for i in range(6)]
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"image": images, "caption": ["a caption"] * 6}), path, row_group_size=2, write_page_checksum=True
    )
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(100):
        path.write_bytes(changed(whole, rng, trial % 2, most_lost=500))
        try:
            source = load_source(SourceConfig("parquet", str(path)), 8)
        except ValueError:
            continue
        found = problems(source)
        assert len(source) == 6 or found
        for index in set(range(len(source))) - set(found):
            read = np.asarray(source[index].load_image().convert("RGB"))
            assert any(np.array_equal(read, pixels(image)) for image in images)


def test_lines_with_changed_bytes(tmp_path):
    (tmp_path / "0.png").write_bytes(encoded("PNG"))
    whole = b"".join(json.dumps({"content": [f"text {i}", {"image": "0.png"}]}).encode() + b"\n" for i in range(6))
    rng = np.random.default_rng(0)
    path = tmp_path / "a.jsonl"
    for trial in range(100):
        path.write_bytes(changed(whole, rng, trial % 2, most_lost=60))
        source = load_source(SourceConfig("interleaved", str(path)), 8)
        found = problems_of_documents(source)
        assert all(problem.count("\n") == 0 for problem in found)


def problems_of_documents(source):
    found = []
    for index in range(len(source)):
        try:
            for part in source[index].parts:
                if callable(part):
                    part()
        except (ValueError, OSError) as error:
            found.append(str(error))
    return found


def test_files_that_are_larger_than_any_image(tmp_path):
    path = tmp_path / "large.jpg"
    with open(path, "wb") as file:
        file.truncate(2**40)  # takes no space
    with pytest.raises(ValueError, match=r"large.jpg is too large to read safely: it must .* got 1099511627776"):
        load_image(path)
