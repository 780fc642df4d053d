"""Parquet files of captioned images: columns, row groups, what is kept of them, and what is wrong with them."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lmfusion.data import SourceConfig, load_source
from lmfusion.data.sources import parquet as parquet_module
from lmfusion.data.sources.parquet import ParquetFiles
from tests.lmfusion.data.storage.stored import encoded, equal, picture, problems

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def count_decoded_images(monkeypatch):
    """A list that grows by the number of rows of every batch of images that is decoded."""
    counts = []
    real = pq.ParquetFile.iter_batches

    def counted(self, *arguments, **options):
        for batch in real(self, *arguments, **options):
            if batch.schema.names == ["image"]:
                counts.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    return counts


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
            "a.parquet/1 must have bytes in column image, got null; a path to a file elsewhere is not read",
            "a.parquet/2 must have bytes in column image",
            "a.parquet/3 is not an image of a known format",
            "a.parquet/4 is damaged or truncated",
            "a.parquet/5: column caption must have a caption",
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
    assert list(found) == [2, 3] and found[2].startswith("1.parquet: the file must be a whole parquet file")
    for number in (0, 3):
        (tmp_path / f"{number}.parquet").unlink()
    with pytest.raises(ValueError, match=r"must have samples, but has none: the file must be a whole parquet file"):
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


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view", "dictionary", "fixed_size", "struct"])
def test_row_groups_have_a_largest_size(tmp_path, monkeypatch, kind):
    """What is decoded counts: a value that the file stores once may stand in every row."""
    data = encoded() + bytes(20_000)
    values = {
        "binary": lambda: pa.array([data] * 100),
        "large_binary": lambda: pa.array([data] * 100, pa.large_binary()),
        "binary_view": lambda: pa.array([data] * 100, pa.binary_view()),
        "dictionary": lambda: pa.array([data + bytes([i]) for i in range(100)]).dictionary_encode(),
        "fixed_size": lambda: pa.array([data] * 100, pa.binary(len(data))),
        "struct": lambda: pa.array([{"bytes": data}] * 100),
    }[kind]()
    path = write(tmp_path / "a.parquet", {"image": values, "caption": ["a"] * 100}, compression="zstd")
    source = ParquetFiles(path)
    monkeypatch.setattr(parquet_module, "MAX_GROUP_BYTES", 1_000_000)
    decoded = count_decoded_images(monkeypatch)
    for row in (0, 1, 99):
        with pytest.raises(ValueError, match=r"image of row group 0 of a.parquet must have at most 1000000 bytes"):
            source[row].load_image()
    assert sum(decoded) <= 100  # it is found out once; of what is not a dictionary a part suffices
    assert kind == "dictionary" or sum(decoded) < 60
    assert source[99].captions == ("a",)


def test_one_read_does_not_hold_two_gibibytes(tmp_path, monkeypatch):
    """Arrow cannot put more than 2 GiB of a struct's bytes into one array, so a row group is decoded in batches."""
    structs = [{"bytes": data, "path": None} for data in images(0, 30)]
    path = write(tmp_path / "a.parquet", {"image": structs, "caption": ["x"] * 30})
    read = count_decoded_images(monkeypatch)
    source = ParquetFiles(path)
    assert all(equal(source[i].load_image(), structs[i]["bytes"]) for i in range(30))
    assert max(read) <= parquet_module.BATCH_ROWS and sum(read) == 30


IMAGE_TYPES = {
    "binary": lambda values: pa.array(values, pa.binary()),
    "large_binary": lambda values: pa.array(values, pa.large_binary()),
    "binary_view": lambda values: pa.array(values, pa.binary_view()),
    "fixed_size_binary": lambda values: pa.array(values, pa.binary(len(values[0]))),
    "dictionary": lambda values: pa.array(values).dictionary_encode(),
    "dictionary of large_binary": lambda values: pa.array(values, pa.large_binary()).dictionary_encode(),
    "struct of binary_view": lambda values: _structs(values, pa.binary_view()),
    "struct of large_binary": lambda values: _structs(values, pa.large_binary()),
    "struct of dictionary": lambda values: _structs(values, pa.dictionary(pa.int32(), pa.binary())),
    "struct of fixed_size_binary": lambda values: _structs(values, pa.binary(len(values[0]))),
}


def _structs(values, kind):
    fields = pa.struct([("bytes", kind), ("path", pa.string())])
    return pa.array([value and {"bytes": value, "path": "x.jpg"} for value in values], fields)


@pytest.mark.parametrize("kind", IMAGE_TYPES)
def test_images_of_every_type(tmp_path, kind):
    longest = max(map(len, images(0, 9)))
    values = [data.ljust(longest, b"\0") for data in images(0, 9)]
    values[3] = None
    path = write(tmp_path / "a.parquet", {"image": IMAGE_TYPES[kind](values), "caption": ["x"] * 9})
    source = ParquetFiles(path)
    for i, value in enumerate(values):
        if value is None:
            with pytest.raises(ValueError, match=r"a.parquet/3 must have bytes in column image"):
                source[i].load_image()
        else:
            assert equal(source[i].load_image(), value)


CAPTION_TYPES = {
    "string": lambda texts: pa.array([text and text[0] for text in texts]),
    "large_string": lambda texts: pa.array([text and text[0] for text in texts], pa.large_string()),
    "string_view": lambda texts: pa.array([text and text[0] for text in texts], pa.string_view()),
    "dictionary": lambda texts: pa.array([text and text[0] for text in texts]).dictionary_encode(),
    "list": lambda texts: pa.array(texts, pa.list_(pa.string())),
    "large_list of large_string": lambda texts: pa.array(texts, pa.large_list(pa.large_string())),
    "list of dictionary": lambda texts: pa.array(texts, pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    "list of string_view": lambda texts: pa.array(texts, pa.list_(pa.string_view())),
    "list_view": lambda texts: pa.array(texts, pa.list_view(pa.string())),
    "large_list_view": lambda texts: pa.array(texts, pa.large_list_view(pa.string())),
    "fixed_size_list": lambda texts: pa.array(texts, pa.list_(pa.string(), 2)),
}


@pytest.mark.parametrize("kind", CAPTION_TYPES)
def test_captions_of_every_type(tmp_path, kind):
    texts = [["a cat", "a tabby"], ["a dog", None], None, ["a cat", "a lion"], ["a cow", None]]
    captions = CAPTION_TYPES[kind](texts)
    source = ParquetFiles(write(tmp_path / "a.parquet", {"image": images(0, 5), "caption": captions}))
    several = "list" in kind
    for i, text in enumerate(texts):
        if text is None:
            with pytest.raises(ValueError, match=r"a.parquet/2: column caption must have a caption"):
                source[i]
        else:
            expected = tuple(filter(None, text)) if several else (text[0],)
            assert source[i].captions == expected


def test_columns_of_one_name(tmp_path):
    table = pa.Table.from_arrays(
        [pa.array(images(0, 1)), pa.array(["a"]), pa.array(["b"])], ["image", "caption", "caption"]
    )
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet must have one column caption, got 2"):
        ParquetFiles(str(tmp_path / "a.parquet"))


def test_a_column_whose_name_has_a_dot(tmp_path):
    columns = {"a": [{"b": 1}], "a.b": images(0, 1), "caption": ["x"]}
    source = ParquetFiles(write(tmp_path / "a.parquet", columns), image="a.b")
    assert equal(source[0].load_image(), columns["a.b"][0])


def test_references_to_no_value_are_damage(tmp_path):
    """Every byte of the pages is changed: each sample is read, or damaged with a reason."""
    columns = {
        "image": pa.array([encoded(image=picture(0, (4, 4)))] * 6).dictionary_encode(),
        "caption": pa.array(["a cat"] * 6).dictionary_encode(),
    }
    path = write(tmp_path / "a.parquet", columns, compression="none")
    data = (tmp_path / "a.parquet").read_bytes()
    first = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for position in range(4, first):
        changed = bytearray(data)
        changed[position] ^= 0x23
        (tmp_path / "a.parquet").write_bytes(changed)
        try:
            source = ParquetFiles(path)
        except ValueError:
            continue
        assert all(reason.startswith(("a.parquet", "row group", "column")) for reason in problems(source).values())


def test_reading_starts_no_threads_of_arrow(tmp_path):
    """Arrow's own threads may abort the process at its end: "terminate called without an active exception"."""
    path = write(tmp_path / "a.parquet", {"image": images(0, 5), "caption": ["x"] * 5}, row_group_size=2)
    program = """
import os, sys
from lmfusion.data.sources.parquet import ParquetFiles
def num_threads():
    return len(os.listdir("/proc/self/task"))
source = ParquetFiles(sys.argv[1])
before = num_threads()
for i in range(len(source)):
    source[i].load_image()
sys.exit(num_threads() > before)
"""
    subprocess.run([sys.executable, "-c", program, path], check=True)


def test_a_list_of_nulls_is_no_caption(tmp_path):
    captions = pa.array([[None, None], ["a"]], pa.list_(pa.string()))
    found = problems(ParquetFiles(write(tmp_path / "a.parquet", {"image": images(0, 2), "caption": captions})))
    assert list(found) == [0] and "the caption is empty" in found[0]


def test_changed_bytes_of_a_footer_end_no_process(tmp_path):
    """Arrow may end the whole process over a damaged footer. Here the schema in one is changed byte by byte."""
    columns = {
        "image": [{"bytes": data, "path": None} for data in images(0, 20)],
        "caption": [["a"], ["b", "c"]] * 10,
        "extra": list(range(20)),
    }
    path = write(tmp_path / "a.parquet", columns, row_group_size=7)
    program = """
import sys
from lmfusion.data.sources.parquet import ParquetFiles
path, copy = sys.argv[1:]
data = open(path, "rb").read()
first = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
num_damaged = 0
for position in range(first, first + 100):
    for value in (0, 2, 10, 34, 50):
        changed = bytearray(data)
        changed[position] = value
        open(copy, "wb").write(changed)
        try:
            source = ParquetFiles(copy)
            source[0].load_image()
        except ValueError:
            num_damaged += 1
print(num_damaged)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, path, str(tmp_path / "copy.parquet")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 100


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"x": [1], "caption": ["a"]}, {}, "must have a column image or jpg or .* got x, caption; name one as image"),
        ({"image": [b"x"], "y": ["a"]}, {}, "must have a column caption or .*; name one as caption"),
        ({"image": [b"x"], "caption": ["a"]}, {"image": "photo"}, "must have a column photo"),
        (
            {"image": ["path.jpg"], "caption": ["a"]},
            {},
            "column image of a.parquet must be binary, or structs with binary bytes, got string",
        ),
        ({"image": [{"path": "x"}], "caption": ["a"]}, {}, "must be binary, or structs with binary bytes, got struct"),
        (
            {"image": [b"x"], "caption": [3]},
            {},
            "column caption of a.parquet must be texts or lists of texts, got int64",
        ),
        ({"image": [b"x"][:0], "caption": ["a"][:0]}, {}, "must have samples, but has none: its files have no rows"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, columns, options, message):
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match=message):
        ParquetFiles(path, **options)


def test_a_stumbling_network_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr("lmfusion.data.storage.files.RETRY_SECONDS", 0.001)
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
