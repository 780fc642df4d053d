"""The index of a tar: a damaged one is made again, and never gives another sample, an error or a traceback."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest

from lmfusion.cli import main
from lmfusion.data.sources.webdataset import WebDataset
from tests.lmfusion.data.storage.stored import encoded, pairs, picture, problems, tar_bytes


@pytest.fixture
def tar(tmp_path, monkeypatch):
    """A tar with a good, a damaged and an unused member, and its index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes([*pairs(0, 3), ("b.jpg", encoded(image=picture(9))), ("c.gif", b"GIF")]))
    WebDataset(str(path))
    (index,) = tmp_path.glob("a.tar.*.index")
    return path, index


def contents(path):
    """Everything that a data set tells and holds."""
    source = WebDataset(str(path))
    found = problems(source)
    whole = [source[i] for i in range(len(source)) if i not in found]
    pixels = [np.asarray(sample.load_image()).tobytes() for sample in whole]
    return source.blocks, found, [(s.sample_id, s.captions) for s in whole], pixels, source.unused


def mutants(whole, rng, number):
    """Bytes changed, missing, doubled, cut off, and added, everywhere."""
    for i in range(number):
        data, at = bytearray(whole), int(rng.integers(len(whole)))
        kind = i % 6
        if kind < 2:
            data[at] ^= 1 << int(rng.integers(8)) if kind else int(rng.integers(1, 256))
        elif kind == 2:
            del data[at : at + int(rng.integers(1, 40))]
        elif kind == 3:
            data[at:at] = rng.bytes(int(rng.integers(1, 40)))
        elif kind == 4:
            data = data[:at]
        else:
            data[at : at + 8] = bytes(8)
        yield bytes(data)


def test_any_damage_is_noticed(tar):
    path, index = tar
    expected, whole = contents(path), index.read_bytes()
    num_made_again = 0
    for data in [*mutants(whole, np.random.default_rng(0), 600), b"", whole[:40], whole + b"x", bytes(len(whole))]:
        index.write_bytes(data)
        assert contents(path) == expected
        assert index.read_bytes() in (whole, data)
        num_made_again += index.read_bytes() == whole
    assert num_made_again > 590  # the others are the index itself, or one that is never opened again


def test_every_single_bit(tar):
    path, index = tar
    expected, whole = contents(path)[:2], index.read_bytes()
    for at in range(0, len(whole), 3):
        index.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        source = WebDataset(str(path))
        assert (source.blocks, problems(source)) == expected


def test_an_index_that_is_damaged_or_deleted_after_opening_is_made_again(tar):
    path, index = tar
    whole = index.read_bytes()
    for damage in (
        lambda: index.unlink(),
        lambda: index.write_bytes(whole[:-9] + bytes(9)),
        lambda: index.write_bytes(b""),
    ):
        source = WebDataset(str(path))
        damage()
        assert list(problems(source)) == [3] and source[1].captions == ("picture 1",)
        assert index.read_bytes() == whole


def test_the_index_of_another_tar_or_format_is_not_taken(tar, tmp_path):
    path, index = tar
    other = tmp_path / "b.tar"
    other.write_bytes(tar_bytes(pairs(5, 9)))
    WebDataset(str(other))
    shutil.copy(index, next(tmp_path.glob("b.tar.*.index")))
    assert WebDataset(str(other))[0].captions == ("picture 5",)
    index.write_bytes(b'{"__metadata__": {}}')  # not one of ours
    assert len(WebDataset(str(path))) == 4


def test_a_folder_in_the_place_of_the_index(tar):
    path, index = tar
    index.unlink()
    index.mkdir()
    assert len(WebDataset(str(path))) == 4 and not problems(WebDataset(str(path))).keys() - {3}


def test_check_of_a_tar_with_a_damaged_index_prints_no_traceback(tar, capsys):
    path, index = tar
    index.write_bytes(index.read_bytes()[::-1])
    assert main(["data", "check", f"webdataset={path}"]) == 1
    assert "4 samples, 3 images" in capsys.readouterr().out


def with_header(index, **changes):
    """The index with other values in its header, and the checksums of a careful forger."""
    data = index.read_bytes()
    length = int.from_bytes(data[32:40], "little")
    header = json.loads(data[40 : 40 + length]) | changes
    text = json.dumps({key: value for key, value in header.items() if value != "gone"}).encode()
    text += b" " * (-len(text) % 8)
    return hashlib.sha256(text).digest() + len(text).to_bytes(8, "little") + text + data[40 + length :]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_samples": 10**12},
        {"num_samples": -1},
        {"num_samples": "many"},
        {"num_samples": None},
        {"num_samples": "gone"},
        {"num_good": -1},
        {"num_good": 10**12},
        {"unused": 3},
        {"unused": [{"x": 1}]},
        {"unused": "gone"},
        {"sha256": "gone"},
    ],
)
def test_a_forged_header_is_not_believed(tar, changes):
    path, index = tar
    expected = contents(path)
    index.write_bytes(with_header(index, **changes))
    assert contents(path) == expected


def test_a_pipe_in_the_place_of_the_index(tar):
    path, index = tar
    expected = contents(path)
    index.unlink()
    os.mkfifo(index)
    assert contents(path) == expected
