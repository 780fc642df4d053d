"""Tars of captioned images: what belongs together, where the index lies, and what is wrong with a tar."""

import io
import json
import os
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lmfusion.data import SourceConfig, load_source
from lmfusion.data.sources import tar_samples
from lmfusion.data.sources import webdataset as webdataset_module
from lmfusion.data.sources.webdataset import WebDataset
from lmfusion.data.storage.files import StoredFile, expand_braces, find_files, is_inside, names_of
from lmfusion.data.storage.tar import TarReader
from lmfusion.images import preprocessing
from tests.lmfusion.data.storage.stored import encoded, equal, pairs, picture, problems, tar_bytes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lmfusion"


@pytest.fixture
def memory():
    filesystem = pytest.importorskip("fsspec").filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def write(path, data):
    path.write_bytes(data)
    return str(path)


def open_tar(tmp_path, members, **options):
    return WebDataset(write(tmp_path / "a.tar", tar_bytes(members)), **options)


# Samples


def test_samples_are_the_members_of_one_name(tmp_path):
    source = load_source(SourceConfig("webdataset", write(tmp_path / "a.tar", tar_bytes(pairs(0, 5)))), 8)
    assert len(source) == 5 and source.blocks == [5]
    for i in range(5):
        sample = source[i]
        assert sample.sample_id == f"a.tar/{i:04d}" and sample.captions == (f"picture {i}",)
        assert equal(sample.load_image(), encoded(image=picture(i)))
    for index in (-1, 5):
        with pytest.raises(IndexError):
            source[index]


def test_members_may_lie_anywhere_in_the_tar(tmp_path):
    members = pairs(0, 4)
    source = open_tar(tmp_path, [*members[::2], ("notes", b"x"), *members[1::2]])
    assert [source[i].captions for i in range(4)] == [(f"picture {i}",) for i in range(4)]


def test_names_with_folders_capitals_and_several_dots(tmp_path):
    image = encoded()
    members = [
        ("./x/a.JPG", image),
        ("./x/a.txt", b"first"),
        ("y/a.seg.png", encoded("PNG")),
        ("y/a.jpeg", image),
        ("y/a.txt", b"second"),
        ("._x.jpg", b"of a Mac"),
        ("y/.hidden.txt", b"hidden"),
        ("__MACOSX/._a.txt", b"hidden"),
    ]
    source = open_tar(tmp_path, members)
    assert [source[i].sample_id for i in range(len(source))] == ["a.tar/x/a", "a.tar/y/a"]
    assert [source[i].captions for i in range(2)] == [("first",), ("second",)]
    assert open_tar(tmp_path, members, image="seg.png")[1].load_image().size == (24, 20)


def test_captions_of_text_and_json(tmp_path):
    image = encoded()
    members = [
        ("a.jpg", image),
        ("a.json", json.dumps({"caption": "json a", "long": ["x", "y"]}).encode()),
        ("a.txt", "eins\r\n\n\ufeffzwei\u2028drei".encode()),
        ("b.jpg", image),
        ("b.json", json.dumps({"text": ["json b", "again"], "long": "z"}).encode()),
    ]
    by_default = open_tar(tmp_path, members)
    assert [c.strip() for c in by_default[0].captions] == ["eins", "\ufeffzwei\u2028drei"]
    assert by_default[1].captions == ("json b", "again")
    from_json = open_tar(tmp_path, members, caption="json")
    assert from_json[0].captions == ("json a",)
    chosen = open_tar(tmp_path, members, caption="json:long")
    assert [chosen[i].captions for i in range(2)] == [("x", "y"), ("z",)]
    for options in ({"image": ""}, {"caption": ":x"}):
        with pytest.raises(ValueError, match="got an empty text"):
            open_tar(tmp_path, members, **options)


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_of_all_formats(tmp_path, kind):
    name = "folder/" * 20 + "é" * 40 + "x" * (10 if kind == tarfile.USTAR_FORMAT else 300)
    image = encoded()
    data = tar_bytes([(f"{name}.jpg", image), (f"{name}.txt", b"long"), ("b.jpg", image), ("b.txt", b"b")], kind)
    source = WebDataset(write(tmp_path / "a.tar", data))
    assert source[0].sample_id == f"a.tar/{name}" and source[0].captions == ("long",)
    assert equal(source[0].load_image(), image) and source[1].sample_id == "a.tar/b"


def test_links_and_folders_in_a_tar_are_passed_over(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (("d.jpg", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "/etc/passwd", 0
            tar.addfile(info)
        for name, data in pairs(0, 1):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = WebDataset(write(tmp_path / "a.tar", buffer.getvalue()))
    assert [source[i].sample_id for i in range(len(source))] == ["a.tar/0000"]


def test_offsets_agree_with_the_tarfile_module(tmp_path):
    rng = np.random.default_rng(0)
    members = [(f"{i}/{'n' * int(rng.integers(1, 200))}.bin", rng.bytes(int(rng.integers(0, 3000)))) for i in range(60)]
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write(tmp_path / "a.tar", tar_bytes(members, kind))
        (file,) = find_files(path, ".tar")
        with tarfile.open(path) as tar:
            expected = [(m.name, m.offset_data, m.size) for m in tar]
        assert [tuple(member) for member in TarReader(file).members()] == expected


def test_names_that_lead_out_are_labels_and_nothing_is_extracted(tmp_path):
    (tmp_path / "data").mkdir()
    image = encoded()
    names = ["../../evil", "/etc/evil", "a\nb\x1b[31m"]
    members = [m for name in names for m in ((f"{name}.jpg", image), (f"{name}.txt", b"x"))]
    source = WebDataset(write(tmp_path / "data" / "a.tar", tar_bytes(members)))
    ids = [source[i].sample_id for i in range(3)]
    assert ids == ["a.tar/../../evil", "a.tar//etc/evil", "a.tar/a\\nb\\x1b[31m"]
    assert not problems(source)
    (index,) = (tmp_path / "data").glob("*.index")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["a.tar", index.name]


# Damaged samples and tars


def test_incomplete_and_doubled_samples_are_one_damaged_sample_each(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_samples, "MAX_TEXT_BYTES", 5000)
    image = encoded()
    members = [
        ("a.jpg", image),
        ("b.txt", b"no image"),
        ("c.jpg", image),
        ("c.txt", b" \n"),
        ("d.jpg", image),
        ("d.txt", b"\xff\xfe"),
        ("e.jpg", image),
        ("e.txt", b"e" * 5001),
        ("f.jpg", image),
        ("f.txt", b"f"),
        ("f.jpg", image),
        ("g.jpg", b"<!DOCTYPE html><p>404"),
        ("g.txt", b"g"),
        ("h.jpg", b""),
        ("h.txt", b"h"),
        ("i.cls", b"neither image nor caption"),
        ("j.jpg", image),
        ("j.txt", b"good"),
    ]
    source = open_tar(tmp_path, members)
    found = problems(source)
    assert len(source) == 9
    expected = [
        "a.tar/a: no caption (txt, json) in the tar, only jpg",
        "a.tar/b: no image (jpg, jpeg, png, webp) in the tar, only txt",
        "a.tar/c: .txt: the caption is empty",
        "a.tar/d: .txt: the text must be UTF-8",
        "a.tar/e: .txt must have at most 5000 bytes, got 5001",
        "a.tar/f: a member of the same name is in the tar twice",
        "a.tar/g is not an image of a known format",
        "a.tar/h is not an image of a known format",
    ]
    assert all(found[i].startswith(message) for i, message in enumerate(expected)), found
    assert len(found) == 8 and source[8].captions == ("good",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "the JSON is damaged"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "must have the key caption or text"),
        (b'{"other": "x"}', "must have the key caption or text"),
        (b'{"caption": 3}', "caption must be a text or a list of texts, got 3"),
        (b'{"caption": ["a", 3]}', "caption must be a text or a list of texts"),
        (b'{"caption": []}', "the caption is empty"),
        (b'{"caption": "\\ud800"}', "must be valid Unicode"),
        (b'{"caption": ' + b"9" * 5000 + b"}", "the JSON is damaged"),
    ],
)
def test_json_without_caption(tmp_path, data, message):
    source = open_tar(tmp_path, [("a.jpg", encoded()), ("a.json", data), *pairs(0, 1)])
    assert list(problems(source)) == [0] and message in problems(source)[0]


def test_image_members_have_a_largest_size(tmp_path, monkeypatch):
    source = open_tar(tmp_path, pairs(0, 2))
    size = len(encoded(image=picture(0)))
    monkeypatch.setattr(preprocessing, "MAX_FILE_BYTES", size - 1)
    with pytest.raises(ValueError, match=rf"a.tar/0000 is too large to read safely: it must .*, got {size}"):
        source[0].load_image()


def test_a_cut_off_tar_gives_what_it_has_and_is_one_damaged_sample(tmp_path):
    whole = tar_bytes(pairs(0, 6))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        ends = [m.offset_data + m.size for m in tar if m.name.endswith(".txt")]
    end_mark = -(-ends[-1] // 512) * 512
    for size in range(0, end_mark + 600, 97):
        path = tmp_path / "a.tar"
        path.write_bytes(whole[:size])
        num_whole = sum(end <= size for end in ends)
        if num_whole == 0:
            with pytest.raises(ValueError, match="must have captioned images"):
                WebDataset(str(path))
            continue
        source = WebDataset(str(path))
        found = problems(source)
        is_whole = size >= end_mark + 512
        assert len(source) == num_whole + (not is_whole), size
        assert list(found) == ([] if is_whole else [num_whole])
        if not is_whole:
            assert found[num_whole].startswith(f"a.tar: the tar ends at byte {size}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda header: b"\xff" * 512, "has a damaged header at byte"),
        (lambda header: header[:124] + b"77777777777\0" + header[136:], "has a damaged header at byte"),
        (lambda header: with_sum(header[:124] + b"77777777777\0" + header[136:]), "inside a member"),
        (lambda header: with_sum(header[:124] + b"\xff" * 12 + header[136:]), "inside a member"),
        (lambda header: with_sum(header[:124] + b"x" * 12 + header[136:]), "has a damaged size"),
        (lambda header: with_sum(header[:156] + b"L" + header[157:]), "has a damaged long name"),
        (
            lambda header: with_sum(header[:124] + b"00007777777\0" + header[136:156] + b"L" + header[157:]),
            "has a header of 2097151 bytes",
        ),
        (lambda header: with_sum(header[:156] + b"x" + header[157:]), "has a damaged pax header"),
    ],
)
def test_a_damaged_header_ends_a_tar_with_one_damaged_sample(tmp_path, damage, message):
    members = pairs(0, 3)
    data = tar_bytes(members)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        start = tar.getmember("0002.jpg").offset
    damaged = data[:start] + damage(data[start : start + 512]) + data[start + 512 :]
    source = WebDataset(write(tmp_path / "a.tar", damaged))
    found = problems(source)
    assert list(found) == [2] and found[2].startswith("a.tar: the tar ")
    assert re.search(message, " ".join(found.values())), found


def test_a_pax_header_of_nothing_but_digits_is_damage(tmp_path):
    data = tar_bytes(pairs(0, 2)).rstrip(b"\0")
    header = with_sum(bytes(124) + b"00000013000\0" + bytes(20) + b"x" + bytes(355))  # 5,632 bytes follow
    padding = bytes(-len(data) % 512)
    source = WebDataset(write(tmp_path / "a.tar", data + padding + header + b"9" * 5631 + b" "))
    assert problems(source)[2].startswith("a.tar: the tar has a damaged pax header")


def with_sum(header):
    """A tar's header with the sum that belongs to it."""
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


def test_foreign_tars_among_good_ones(tmp_path):
    write(tmp_path / "0.tar", tar_bytes(pairs(0, 2)))
    write(tmp_path / "1.tar", b"")
    write(tmp_path / "2.tar", encoded() * 3)
    write(tmp_path / "3.tar", b"\x1f\x8b" + b"x" * 2000)
    write(tmp_path / "4.tar", tar_bytes([("notes.md", b"nothing")]))
    write(tmp_path / "5.tar", tar_bytes(pairs(2, 4)))
    source = WebDataset(str(tmp_path / "?.tar"))
    assert source.blocks == [2, 1, 1, 1, 1, 2]
    assert problems(source) == {
        2: "1.tar: the tar ends at byte 0 without an end mark; it is empty or cut off",
        3: "2.tar: the tar is not a tar",
        4: "3.tar: the tar is compressed, but its members must be readable one by one; gunzip it",
        5: "4.tar: the tar holds no jpg, jpeg, png, webp with captions",
    }
    assert source[7].sample_id == "5.tar/0003"


def test_a_source_without_a_good_sample_is_refused_with_a_reason(tmp_path):
    with pytest.raises(
        ValueError, match=r"a\.tar must have captioned images, .*no image \(tiff\) in the tar, only jpg, txt"
    ):
        open_tar(tmp_path, pairs(0, 3), image="tiff")


# The index


def test_the_index_is_kept_beside_the_tar_and_made_again_when_that_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar", tar_bytes(pairs(0, 3)))
    assert len(WebDataset(path)) == 3
    (index,) = tmp_path.glob("a.tar.*.index")
    with monkeypatch.context() as patched:
        patched.setattr(webdataset_module, "index_tar", None)
        assert WebDataset(path)[2].captions == ("picture 2",)
    write(tmp_path / "a.tar", tar_bytes(pairs(5, 7)))
    assert [WebDataset(path)[i].captions for i in range(2)] == [("picture 5",), ("picture 6",)]
    index.write_bytes(index.read_bytes()[:50])
    assert WebDataset(path)[1].captions == ("picture 6",)
    index.write_bytes(b"")
    assert WebDataset(path)[1].captions == ("picture 6",)
    WebDataset(path, image="jpg")
    assert len(list(tmp_path.glob("a.tar.*.index"))) == 2  # another choice of members, another index
    assert not list(tmp_path.glob("*.partial"))


def test_without_a_place_beside_the_tar_the_index_lies_in_the_cache_or_in_memory(tmp_path, monkeypatch, cache):
    path = write(tmp_path / "a.tar", tar_bytes(pairs(0, 3)))
    save = webdataset_module.save_index
    monkeypatch.setattr(
        webdataset_module, "save_index", lambda place, *rest: cache in place.parents and save(place, *rest)
    )
    assert WebDataset(path)[2].captions == ("picture 2",)
    assert len(list(cache.glob("*.index"))) == 1 and not list(tmp_path.glob("*.index"))
    for file in cache.glob("*.index"):
        file.unlink()
    monkeypatch.setattr(webdataset_module, "save_index", lambda *arguments: False)
    source = WebDataset(path)
    assert source[2].captions == ("picture 2",) and not problems(source)


def test_threads_read_what_one_reads(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.tar", tar_bytes(pairs(10 * i, 10 * i + 10)))
    source = WebDataset(str(tmp_path / "{0..2}.tar"))
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda i: np.asarray(source[i % 30].load_image()), range(120)))
    assert all(np.array_equal(image, images[i % 30]) for i, image in enumerate(images))


# Addresses


@pytest.mark.parametrize("pattern", ["memory://set/s-{0..1}.tar", "memory://set/*.tar"])
def test_tars_at_an_address(memory, cache, pattern):
    for i in range(2):
        memory.pipe(f"/set/s-{i}.tar", tar_bytes(pairs(3 * i, 3 * i + 3)))
    source = load_source(SourceConfig("webdataset", pattern), 8)
    assert source.blocks == [3, 3] and source[4].sample_id == "s-1.tar/0004"
    assert equal(source[4].load_image(), encoded(image=picture(4))) and not problems(source)
    assert len(list(cache.glob("*.index"))) == 2
    memory.pipe("/set/s-1.tar", tar_bytes(pairs(7, 8)))
    assert load_source(SourceConfig("webdataset", pattern), 8)[3].captions == ("picture 7",)


def test_file_addresses_and_a_cut_off_tar_at_an_address(tmp_path, memory):
    path = write(tmp_path / "a.tar", tar_bytes(pairs(0, 3)))
    assert not problems(WebDataset(f"file://{path}"))
    memory.pipe("/a.tar", tar_bytes(pairs(0, 3))[:4000])
    source = WebDataset("memory://a.tar")
    assert list(problems(source)) == [len(source) - 1]


def test_a_remote_tar_is_read_in_few_requests(memory, monkeypatch):
    memory.pipe("/a.tar", tar_bytes(pairs(0, 50)))
    requests = []
    cat_file = memory.cat_file
    monkeypatch.setattr(
        memory, "cat_file", lambda *args, **kwargs: requests.append(kwargs) or cat_file(*args, **kwargs)
    )
    source = WebDataset("memory://a.tar")
    assert len(requests) <= 2
    assert [source[i].captions for i in range(50)] and len(requests) <= 2
    source[7].load_image()
    assert len(requests) <= 3


def test_a_stumbling_network_is_asked_again_and_a_broken_one_is_named(memory, monkeypatch):
    monkeypatch.setattr("lmfusion.data.storage.files.RETRY_SECONDS", 0.001)
    memory.pipe("/a.tar", tar_bytes(pairs(0, 2)))
    source = WebDataset("memory://a.tar")
    cat_file, failures = memory.cat_file, iter([RuntimeError("reset"), TimeoutError("late")])

    def stumbling(*args, **kwargs):
        for failure in failures:
            raise failure
        return cat_file(*args, **kwargs)

    monkeypatch.setattr(memory, "cat_file", stumbling)
    assert equal(source[1].load_image(), encoded(image=picture(1)))
    monkeypatch.setattr(memory, "cat_file", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(OSError, match=r"cannot read memory://a.tar: ZeroDivisionError"):
        source[1].load_image()


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("{tmp}/gone.tar", FileNotFoundError, "there is no file .*gone.tar"),
        ("{tmp}/*.zip", ValueError, "must match a file"),
        ("{tmp}", ValueError, "must be a regular file"),
        ("memory://gone.tar", FileNotFoundError, "there is no file memory://gone.tar"),
        ("memory://gone-*.tar", ValueError, "must match a file"),
        ("nowhere://a.tar", ValueError, "cannot read nowhere://a.tar: Protocol not known"),
        ("{tmp}/{{a,a}}.tar", ValueError, "matches .*a.tar twice"),
        (
            "{tmp}/{{a,b,c,d,e}}.tar",
            FileNotFoundError,
            r"4 of the 5 files of .* are missing: .*b.tar, .*c.tar, .*d.tar, \.\.\.",
        ),
        ("{tmp}/{{9..0}}.tar", ValueError, "must have the lower number first"),
        ("{tmp}/{{0..99999999}}.tar", ValueError, "at most 1000000 files"),
        ("{tmp}/{{0..9999}}{{0..9999}}.tar", ValueError, "at most 1000000 files, got 100000000"),
    ],
)
def test_paths_that_cannot_be_used(tmp_path, path, error, message):
    pytest.importorskip("fsspec")
    write(tmp_path / "a.tar", tar_bytes(pairs(0, 1)))
    with pytest.raises(error, match=message):
        WebDataset(path.format(tmp=tmp_path))


def test_braces_and_names():
    assert list(expand_braces("a-{08..10}-{x,y}.tar")) == [
        f"a-{number}-{letter}.tar" for number in ("08", "09", "10") for letter in "xy"
    ]
    assert list(expand_braces("plain.tar")) == ["plain.tar"]
    files = [StoredFile(path, 0, "") for path in ("/d/a/0.tar", "/d/b/0.tar")]
    assert names_of(files) == ["a/0.tar", "b/0.tar"] and names_of(files[:1]) == ["0.tar"]


def test_a_path_with_the_signs_of_a_glob_is_a_path_where_there_is_one(tmp_path):
    assert len(WebDataset(write(tmp_path / "a[1].tar", tar_bytes(pairs(0, 1))))) == 1


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="must be a regular file"):
        WebDataset(str(tmp_path / "a.tar"))


@pytest.mark.parametrize("name", ["", "/a", "../a", "a/../../b", "a\\..\\b", "http://x/a", "\\\\host\\a", "a\0b"])
def test_names_that_lead_out_of_their_folder(name):
    assert not is_inside(name) and is_inside(f"a/b.c {len(name)}")
