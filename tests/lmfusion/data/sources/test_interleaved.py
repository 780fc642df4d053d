"""Interleaved documents: lines, the images they name, and what is wrong with them."""

import json

import pytest

from lmfusion.data import SourceConfig, load_source
from lmfusion.data.sources import interleaved as interleaved_module
from lmfusion.data.sources.interleaved import InterleavedFiles
from tests.lmfusion.data.storage.stored import encoded, equal, picture, problems


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(encoded(image=picture(i)))
    return tmp_path


def write(folder, *documents, name="a.jsonl", ending="\n"):
    lines = [document if isinstance(document, str) else json.dumps(document) for document in documents]
    (folder / name).write_text("\n".join(lines) + ending, encoding="utf-8", newline="")
    return str(folder / name)


def image(i):
    return {"image": f"images/{i}.jpg"}


def test_documents_keep_their_parts_in_order(folder):
    path = write(folder, {"id": "first", "content": ["A ", image(0), " \n", image(1), "end"]}, {"content": [image(2)]})
    source = load_source(SourceConfig("interleaved", path), 8)
    assert len(source) == 2 and source.blocks == [2]
    first = source[0]
    assert first.sample_id == "a.jsonl/first" and source[1].sample_id == "a.jsonl/2"
    assert [callable(part) for part in first.parts] == [False, True, True, False]
    assert (first.parts[0], first.parts[3]) == ("A ", "end")
    assert equal(first.parts[2](), encoded(image=picture(1)))
    for index in (-1, 2):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize("ending", ["\n", "", "\n\n\n"])
@pytest.mark.parametrize("read_bytes", [7, 8 * 2**20])
def test_lines_of_several_files_wherever_reading_is_cut(folder, monkeypatch, ending, read_bytes):
    monkeypatch.setattr(interleaved_module, "READ_BYTES", read_bytes)
    write(folder, {"content": ["eins"]}, "", {"content": ["zw\u2028ei \U0001f600"], "id": 7}, ending=ending)
    write(folder, name="b.jsonl", ending="")
    write(folder, {"content": ["drei"]}, name="c.jsonl", ending=ending)
    source = InterleavedFiles(str(folder / "*.jsonl"))
    assert source.blocks == [2, 1]
    assert [source[i].sample_id for i in range(3)] == ["a.jsonl/1", "a.jsonl/7", "c.jsonl/1"]
    assert [source[i].parts for i in range(3)] == [("eins",), ("zw\u2028ei \U0001f600",), ("drei",)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "the JSON is damaged"),
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "the line must be an object like"),
        ({"content": "text"}, "the line must be an object like"),
        ({"text": "x"}, "the line must be an object like"),
        ({"content": []}, "content is empty"),
        ({"content": [" \n"]}, "content is empty"),
        ({"content": [3]}, "content must hold texts"),
        ({"content": [{"image": 3}]}, "must name an image by a path or a data URL"),
        ({"content": [{"video": "x.mp4"}]}, "content must hold texts"),
        ({"content": [["x"]]}, "content must hold texts"),
        ('{"content": ["\\ud800"]}', "must be valid Unicode"),
        ({"content": ["x"], "id": True}, "whole number, got True"),
        ({"content": ["x"], "id": ""}, "whole number, got ''"),
        ({"content": [{"image": "../secret.jpg"}]}, "must stay in the folder"),
        ({"content": [{"image": "/etc/passwd"}]}, "must stay in the folder"),
        ({"content": [{"image": "images/../../x.jpg"}]}, "must stay in the folder"),
        ({"content": [{"image": "memory://x.jpg"}]}, "must stay in the folder"),
        ({"content": [{"image": "a\0b"}]}, "must stay in the folder"),
        ({"content": [{"image": ""}]}, "must stay in the folder"),
        ({"content": [{"image": "HTTPS://example.org/x.jpg"}]}, "which is not fetched; download it"),
        ({"content": [{"image": "images/gone.jpg"}]}, "gone.jpg"),
        ({"content": [{"image": "images"}]}, "must be a regular file"),
        ({"content": [{"image": "a.jsonl"}]}, "not an image of a known format"),
    ],
)
def test_a_damaged_line_is_one_damaged_sample(folder, line, message):
    source = InterleavedFiles(write(folder, {"content": ["good", image(0)]}, line, {"content": [image(1)]}))
    found = problems(source)
    assert list(found) == [1] and message in found[1]
    assert "line 2" in found[1] or "images" in found[1] or "a.jsonl" in found[1]


def test_text_that_is_not_utf8_and_lines_too_long(folder, monkeypatch):
    monkeypatch.setattr(interleaved_module, "MAX_LINE_BYTES", 100)
    path = folder / "a.jsonl"
    path.write_bytes(
        b'{"content": ["\xff"]}\n' + json.dumps({"content": ["x" * 100]}).encode() + b'\n{"content": ["y"]}\n'
    )
    found = problems_of_lines(InterleavedFiles(str(path)))
    assert (
        "line 1: the text must be UTF-8" in found[0]
        and "line 2: the line must have at most 100 bytes, got 117" in found[1]
    )
    assert len(found) == 2


def problems_of_lines(source):
    found = {}
    for index in range(len(source)):
        try:
            source[index]
        except ValueError as error:
            found[index] = str(error)
    return found


def test_an_id_cannot_move_the_cursor(folder):
    source = InterleavedFiles(write(folder, {"id": "a\x1b[2J\nb", "content": [image(0)]}))
    assert source[0].sample_id == "a.jsonl/a\\x1b[2J\\nb"


def test_images_lie_beside_their_file_at_an_address(folder):
    filesystem = pytest.importorskip("fsspec").filesystem("memory")
    filesystem.pipe("/set/images/0.jpg", encoded(image=picture(0)))
    filesystem.pipe("/set/a.jsonl", json.dumps({"content": ["x", image(0), image(1)]}).encode())
    source = InterleavedFiles("memory://set/*.jsonl")
    assert equal(source[0].parts[1](), encoded(image=picture(0)))
    with pytest.raises(FileNotFoundError, match=r"no file memory:///?set/images/1.jpg"):
        source[0].parts[2]()
    local = InterleavedFiles(f"file://{write(folder, {'content': [image(2)]})}")
    assert equal(local[0].parts[0](), encoded(image=picture(2)))
    filesystem.store.clear()


def test_nothing_to_read(folder):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        InterleavedFiles(str(folder / "gone.jsonl"))
    with pytest.raises(ValueError, match="must have at least one line"):
        InterleavedFiles(write(folder, ending=""))
    with pytest.raises(ValueError, match="must be a regular file"):
        InterleavedFiles(str(folder))


@pytest.mark.parametrize("read_bytes", [3, 8 * 2**20])
def test_blank_lines_are_no_documents(folder, monkeypatch, read_bytes):
    monkeypatch.setattr(interleaved_module, "READ_BYTES", read_bytes)
    (folder / "a.jsonl").write_bytes(b'\r\n{"content": ["a"]}\r\n\r\n \t \n{"content": ["b"]}\r\n  \r\n\t')
    source = InterleavedFiles(str(folder / "a.jsonl"))
    assert [source[i].sample_id for i in range(len(source))] == ["a.jsonl/2", "a.jsonl/5"]
    (folder / "b.jsonl").write_bytes(b"\r\n\r\n")
    with pytest.raises(ValueError, match="must have at least one line"):
        InterleavedFiles(str(folder / "b.jsonl"))


@pytest.mark.parametrize("keys", ["id", "messages", "conversations", "source", "image"])
def test_a_key_of_null_is_a_key_that_is_not_there(folder, keys):
    source = InterleavedFiles(write(folder, {"content": ["a"], keys: None}))
    assert source[0].parts == ("a",) and source[0].sample_id == "a.jsonl/1"
