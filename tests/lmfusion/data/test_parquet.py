"""Parquet files of captioned images: columns, row groups, what is kept of them, and what is wrong with them."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lmfusion.data import SourceConfig, load_source
from lmfusion.data import parquet as parquet_module
from lmfusion.data.parquet import ParquetFiles, _Cache
from tests.lmfusion.data.stored import encoded, equal, picture, problems

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def images(first, last):
    return [encoded(image=picture(i)) for i in range(first, last)]


def test_structs_as_hugging_face_writes_them(tmp_path):
    structs = [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(images(0, 5))]
    path = write(tmp_path / "a.parquet", {"image": structs, "text": [f"text {i}" for i in range(5)]}, row_group_size=2)
    source = load_source(SourceConfig("parquet", path), 8)
    assert len(source) == 5 and source.blocks == [2, 2, 1]
    for i in range(5):
        assert source[i].sample_id == f"a.parquet/{i}" and source[i].captions == (f"text {i}",)
        assert equal(source[i].load_image(), structs[i]["bytes"])
    for index in (-1, 5):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize("binary", ["binary", "large_binary"])
def test_plain_bytes_several_captions_and_several_files(tmp_path, binary):
    for i in range(2):
        columns = {
            "jpg": pa.array(images(2 * i, 2 * i + 2), getattr(pa, binary)()),
            "caption": [["a", "b"], [f"c{i}"]],
            "other": [1, 2],
        }
        write(tmp_path / f"{i}.parquet", columns)
    source = ParquetFiles(str(tmp_path / "{0..1}.parquet"))
    assert source.blocks == [2, 2] and source[3].sample_id == "1.parquet/1"
    assert source[0].captions == ("a", "b") and source[3].captions == ("c1",)
    assert equal(source[3].load_image(), images(3, 4)[0])


def test_columns_can_be_chosen(tmp_path):
    columns = {"image": images(0, 1), "picture": images(1, 2), "caption": ["usual"], "long": ["chosen"]}
    path = write(tmp_path / "a.parquet", columns)
    assert ParquetFiles(path)[0].captions == ("usual",)
    source = ParquetFiles(path, image="picture", caption="long")
    assert source[0].captions == ("chosen",) and equal(source[0].load_image(), columns["picture"][0])


def test_planning_reads_no_image_and_row_groups_are_kept(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"image": images(0, 6), "caption": list("abcdef")}, row_group_size=3)
    source = ParquetFiles(path)
    read = []
    real = source._read_column
    monkeypatch.setattr(source, "_read_column", lambda group, column: read.append(column) or real(group, column))
    assert [source[i].captions for i in range(6)] == [(letter,) for letter in "abcdef"] and read == ["caption"] * 2
    for i in range(6):
        source[i].load_image()
    assert read == ["caption", "caption", "image", "image"]


def test_cache_forgets_the_least_recently_used_and_makes_each_once():
    cache, made = _Cache(10), []

    def make(name, size):
        return lambda: (made.append(name) or name, size)

    assert [cache.get(name, make(name, 4)) for name in "abacab"] == list("abacab")
    assert made == ["a", "b", "c", "b"]  # b was forgotten for c
    assert cache.get("huge", make("huge", 99)) == "huge" and cache.get("huge", make("huge", 99)) == "huge"
    assert made.count("huge") == 1
    with pytest.raises(ZeroDivisionError):
        cache.get("x", lambda: (1 / 0, 1))
    assert cache.get("x", make("x", 1)) == "x"
    slow, started = [], threading.Barrier(4)

    def once():
        slow.append(1)
        time.sleep(0.05)
        return "slow", 1

    def ask(_):
        started.wait()
        return cache.get("slow", once)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == ["slow"] * 4
    assert slow == [1]


def test_threads_read_what_one_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_module, "CACHE_BYTES", 3000)  # one or two row groups
    path = write(tmp_path / "a.parquet", {"image": images(0, 12), "caption": ["x"] * 12}, row_group_size=2)
    source = ParquetFiles(path)
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda i: np.asarray(source[i * 5 % 12].load_image()), range(60)))
    assert all(np.array_equal(image, read[i % 12]) for i, image in enumerate(read))


def test_rows_that_are_damaged(tmp_path):
    good = encoded()
    structs = [
        {"bytes": good, "path": None},
        {"bytes": None, "path": "elsewhere.jpg"},
        None,
        {"bytes": b"", "path": None},
        {"bytes": good[:-40], "path": None},
        {"bytes": good, "path": None},
        {"bytes": good, "path": None},
        {"bytes": good, "path": None},
    ]
    captions = [["fine"], ["x"], ["x"], ["x"], ["x"], None, [], ["  "]]
    source = ParquetFiles(write(tmp_path / "a.parquet", {"image": structs, "caption": captions}))
    found = problems(source)
    for index, message in enumerate(
        [
            "a.parquet/1 has no bytes in column image; it may name a file elsewhere, but holds no image",
            "a.parquet/2 has no bytes in column image",
            "a.parquet/3 is not an image of a known format",
            "a.parquet/4 is damaged or truncated",
            "a.parquet/5: no caption in column caption",
            "a.parquet/6: the caption is empty",
            "a.parquet/7: the caption is empty",
        ],
        start=1,
    ):
        assert found.pop(index).startswith(message)
    assert not found


def test_damaged_files_among_good_ones(tmp_path):
    write(tmp_path / "0.parquet", {"image": images(0, 2), "caption": ["a", "b"]})
    data = (tmp_path / "0.parquet").read_bytes()
    (tmp_path / "1.parquet").write_bytes(data[: len(data) // 2])
    (tmp_path / "2.parquet").write_bytes(b"")
    write(tmp_path / "3.parquet", {"image": images(2, 4), "caption": ["c", "d"]})
    source = ParquetFiles(str(tmp_path / "*.parquet"))
    assert source.blocks == [2, 1, 1, 2] and source[5].captions == ("d",)
    found = problems(source)
    assert list(found) == [2, 3] and found[2].startswith("1.parquet: the file is no parquet file, or is damaged")
    for number in (0, 3):
        (tmp_path / f"{number}.parquet").unlink()
    with pytest.raises(ValueError, match=r"there is no sample in .*: the file is no parquet file"):
        ParquetFiles(str(tmp_path / "*.parquet"))


def test_a_damaged_row_group_leaves_the_others(tmp_path):
    path = tmp_path / "a.parquet"
    columns = {"image": images(0, 6), "caption": list("abcdef")}
    plain = dict(compression="none", use_dictionary=False, write_statistics=False)
    write(path, columns, row_group_size=2, write_page_checksum=True, **plain)
    data = bytearray(path.read_bytes())
    data[data.index(columns["image"][2]) + 300] ^= 0x40  # within the second row group, where Pillow would not notice
    path.write_bytes(data)
    source = ParquetFiles(str(path))
    found = problems(source)
    assert list(found) == [2, 3] and all("row group 1 of a.parquet cannot be read" in text for text in found.values())


def test_row_groups_have_a_largest_size(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"image": images(0, 2), "caption": ["a", "b"]})
    source = ParquetFiles(path)
    monkeypatch.setattr(parquet_module, "MAX_GROUP_BYTES", 500)
    with pytest.raises(ValueError, match=r"row group 0 of a.parquet holds \d+ bytes of image; the limit is 500"):
        source[0].load_image()


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"x": [1], "caption": ["a"]}, {}, "has no column image or jpg or .* it has x, caption: name one as image"),
        ({"image": [b"x"], "y": ["a"]}, {}, "has no column caption or .*: name one as caption"),
        ({"image": [b"x"], "caption": ["a"]}, {"image": "photo"}, "has no column photo"),
        ({"image": ["path.jpg"], "caption": ["a"]}, {}, "column image of a.parquet is string; images are binary"),
        ({"image": [{"path": "x"}], "caption": ["a"]}, {}, "images are binary, or structs with binary bytes"),
        ({"image": [b"x"], "caption": [3]}, {}, "column caption of a.parquet is int64; captions are texts"),
        ({"image": [b"x"][:0], "caption": ["a"][:0]}, {}, "there is no sample in .*: its files have no rows"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, columns, options, message):
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match=message):
        ParquetFiles(path, **options)


def test_a_stumbling_network_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr("lmfusion.data.remote.RETRY_SECONDS", 0.001)
    filesystem = pytest.importorskip("fsspec").filesystem("memory")
    write(tmp_path / "a.parquet", {"image": images(0, 2), "caption": ["a", "b"]})
    filesystem.pipe("/set/a.parquet", (tmp_path / "a.parquet").read_bytes())
    cat_file, calls = filesystem.cat_file, []

    def stumbling(*arguments, **options):
        calls.append(options)
        if len(calls) % 3:
            raise TimeoutError("late")
        return cat_file(*arguments, **options)

    monkeypatch.setattr(filesystem, "cat_file", stumbling)
    assert not problems(ParquetFiles("memory://set/a.parquet")) and len(calls) > 6
    filesystem.store.clear()


def test_files_at_an_address(tmp_path):
    filesystem = pytest.importorskip("fsspec").filesystem("memory")
    path = write(tmp_path / "a.parquet", {"image": images(0, 3), "caption": ["a", "b", "c"]}, row_group_size=2)
    filesystem.pipe("/set/a.parquet", (tmp_path / "a.parquet").read_bytes())
    for address in ("memory://set/*.parquet", f"file://{path}"):
        source = ParquetFiles(address)
        assert source.blocks == [2, 1] and not problems(source) and source[2].sample_id == "a.parquet/2"
    filesystem.store.clear()
