"""A folder of images: captions beside them or in metadata.jsonl, and what is wrong with one of them."""

import json
import os
import tracemalloc

import pytest
from PIL import Image

from lmfusion.data import SourceConfig, load_source
from lmfusion.data.sources import folder as folder_module
from tests.lmfusion.data.storage.stored import encoded, problems


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(["a.png", "sub/b.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (12, 8), (40 * i, 0, 0)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"image {i}\nanother {i}\n")
    return tmp_path


def load(folder):
    return load_source(SourceConfig("folder", str(folder)), 8)


def test_text_files(folder):
    source = load(folder)
    assert [source[i].sample_id for i in range(len(source))] == ["a.png", "sub/b.png"]
    assert source[1].captions == ("image 1", "another 1") and sum(source.blocks) == 2
    assert source[1].load_image().getpixel((0, 0)) == (40, 0, 0)


def test_metadata(folder):
    lines = [{"file_name": "./sub/b.png", "text": "b"}, {"file_name": "a.png", "text": ["a", "an a"]}]
    (folder / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    source = load(folder)
    assert [source[i].captions for i in range(len(source))] == [("a", "an a"), ("b",)]
    assert source[1].sample_id == "sub/b.png" and not problems(source)


def test_captions_are_split_at_newlines_alone(folder):
    text = "\ufeffa cat\u2028sleeping\n\na second caption\n"
    (folder / "a.txt").write_text(text, encoding="utf-8")
    assert load(folder)[0].captions == ("a cat\u2028sleeping", "a second caption")
    lines = [{"file_name": "a.png", "text": "a cat\u2028sleeping"}]
    (folder / "metadata.jsonl").write_text("\ufeff" + json.dumps(lines[0], ensure_ascii=False), encoding="utf-8")
    assert load(folder)[0].captions == ("a cat\u2028sleeping",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.png", "text": " "}', "the caption is empty"),
        ('{"file_name": "a.png", "text": []}', "the caption is empty"),
        ('{"file_name": "../a.png", "text": "x"}', "stays in the folder"),
        ('{"file_name": "/etc/passwd", "text": "x"}', "stays in the folder"),
        ('{"file_name": "", "text": "x"}', "stays in the folder"),
        ('{"file_name": "a.png"}', "must be an object like"),
        ('{"file_name": "a.png", "text": 3}', "text must be a text or a list of texts, got 3"),
        ('{"file_name": "a.png", "text": "\\ud800"}', "must be valid Unicode"),
        ("[1]", "must be an object like"),
        ("{", "the JSON is damaged"),
        ("\udcff", "must be UTF-8"),
        ('{"file_name": "sub/b.png", "text": "x"}', "sub/b.png is listed twice"),
    ],
)
def test_a_bad_line_of_metadata_is_one_damaged_sample(folder, line, message):
    good = json.dumps({"file_name": "sub/b.png", "text": "good"})
    (folder / "metadata.jsonl").write_text(f"{good}\n{line}\n", errors="surrogateescape")
    source = load(folder)
    found = problems(source)
    assert len(source) == 2 and list(found) == [0]
    assert found[0].startswith("metadata.jsonl, line 2: ") and message in found[0]
    assert source[1].captions == ("good",)


def test_lines_of_metadata_have_a_largest_size(folder, monkeypatch):
    monkeypatch.setattr(folder_module, "MAX_TEXT_BYTES", 100)
    entries = [{"file_name": "a.png", "text": "x" * 100}, {"file_name": "sub/b.png", "text": "x"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    assert problems(load(folder)) == {0: "metadata.jsonl, line 1: the line must have at most 100 bytes, got 135"}
    (folder / "metadata.jsonl").unlink()
    (folder / "a.txt").write_text("x" * 101)
    assert problems(load(folder)) == {0: "a.png: a.txt must have at most 100 bytes, got 101"}


def test_a_missing_image_is_one_damaged_sample(folder):
    entries = [{"file_name": name, "text": "x"} for name in ("gone.png", "a.png", "sub")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    found = problems(load(folder))
    assert list(found) == [1, 2] and "gone.png" in found[1] and "must be a regular file" in found[2]


def test_a_missing_empty_or_unreadable_caption_is_one_damaged_sample(folder):
    for content, message in (
        (b" \n", "the caption is empty"),
        (b"\xe4", "must be UTF-8"),
        (None, "no caption; write it to a .txt"),
    ):
        if content is None:
            (folder / "a.txt").unlink()
        else:
            (folder / "a.txt").write_bytes(content)
        found = problems(load(folder))
        assert list(found) == [0] and found[0].startswith("a.png: ") and message in found[0]


def test_hidden_files_pipes_and_circles_of_links(folder):
    (folder / "._a.png").write_bytes(b"of a Mac")
    os.mkfifo(folder / "pipe.png")
    (folder / "pipe.txt").write_text("would be waited for")
    (folder / "sub" / "circle").symlink_to(folder)
    source = load(folder)
    assert len(source) == 3
    assert problems(source) == {1: f"{folder / 'pipe.png'} must be a regular file; leave it out"}


def test_no_folder_or_no_images(tmp_path):
    for path in (tmp_path / "nowhere", "memory://photos"):
        with pytest.raises(ValueError, match="must be a folder of images"):
            load(path)
    with pytest.raises(ValueError, match="must have images with captions"):
        load(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match="must have images with captions"):
        load(tmp_path)


def test_long_lines_of_metadata_are_not_held_in_memory(folder):
    good = json.dumps({"file_name": "a.png", "text": "good"})
    with open(folder / "metadata.jsonl", "wb") as file:
        file.write(b"[" * 3_000_000 + b"\n" + good.encode() + b"\n")
        file.seek(300_000_000, os.SEEK_CUR)  # a hole, without a newline
        file.write(b"x")
    tracemalloc.start()
    found = problems(load(folder))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert list(found.values()) == [
        "metadata.jsonl, line 1: the line must have at most 1048576 bytes, got 3000001",
        "metadata.jsonl, line 3: the line must have at most 1048576 bytes, got 300000001",
    ]
    assert peak < 10_000_000


def test_a_caption_file_that_is_a_link_to_nothing_is_damage(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(encoded("PNG"))
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere.txt")
    source = load_source(SourceConfig("folder", str(tmp_path)), 8)
    assert source[0].captions == ("a cat",)
    with pytest.raises(ValueError, match=r"b\.png: its caption file b\.txt is a link to nothing"):
        source[1]
