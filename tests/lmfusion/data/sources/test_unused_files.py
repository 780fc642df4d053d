"""No file that looks like an image or a caption disappears: it is in a sample, or damaged, or named as not used."""

import io
import itertools
import json
import tarfile

import numpy as np
import pytest
import yaml

from lmfusion.cli import main
from lmfusion.data import SourceConfig, load_source
from lmfusion.data.sources.unused_files import describe_unused
from lmfusion.data.sources.webdataset import WebDataset
from lmfusion.images.formats import IMAGE_SUFFIXES
from tests.lmfusion.data.storage.stored import encoded, equal, pairs, picture, problems, tar_bytes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def data_of(name):
    """What a file of that name holds."""
    suffix = name.rpartition(".")[2].lower()
    if suffix == "json":
        return json.dumps({"caption": name}).encode()
    return name.encode() if suffix in ("txt", "caption", "cls") else encoded("PNG", picture(len(name)))


def open_tar(tmp_path, names, **options):
    (tmp_path / "a.tar").write_bytes(tar_bytes([(name, data_of(name)) for name in names]))
    return WebDataset(str(tmp_path / "a.tar"), **options)


def good(source):
    """Names and captions of the samples that are whole."""
    found = problems(source)
    return {source[i].sample_id.partition("/")[2]: source[i].captions for i in range(len(source)) if i not in found}


def unused(source):
    return {of_kind.kind: (of_kind.count, of_kind.names) for of_kind in source.unused}


# Tars


def test_names_of_several_dots_are_pairs(tmp_path):
    names = ["22.05", "v1.2_cat", "v1.3_cat", "a/x.y.z", "plain"]
    source = open_tar(tmp_path, [f"{name}.{suffix}" for name in names for suffix in ("png", "txt")])
    assert good(source) == {name: (f"{name}.txt",) for name in names}
    assert not problems(source) and not source.unused
    assert equal(source[1].load_image(), data_of("v1.2_cat.png"))


def test_two_samples_of_one_name_up_to_the_first_dot_and_the_sample_of_that_name(tmp_path):
    names = ["22.05.JPG", "22.txt", "22.06.Png", "22.06.TXT", "22.png", "22.05.txt", "22.07.webp", "22.07.json"]
    source = open_tar(tmp_path, names)
    assert list(good(source)) == ["22.05", "22", "22.06", "22.07"] and not problems(source) and not source.unused


@pytest.mark.parametrize(
    ("names", "options", "samples", "damaged", "not_used"),
    [
        # As webdataset has it: everything behind the first dot is the suffix
        (["a.jpg", "a.txt", "a.seg.png"], {}, ["a"], [], ["a.seg.png"]),
        (["a.jpg", "a.txt", "a.seg.png"], {"image": "seg.png"}, ["a"], [], []),
        (["a.jpg", "a.caption.txt"], {"caption": "caption.txt"}, ["a"], [], []),
        (["1.2.seg.png", "1.2.png", "1.2.txt"], {"image": "seg.png"}, ["1.2"], [], []),
        (["a.cls", "a.jpg", "a.txt"], {}, ["a"], [], []),
        (["a.txt", "a.json", "a.jpg"], {}, ["a"], [], []),  # what img2dataset writes
        # Half of a sample is one damaged sample
        (["a.jpg", "a.caption.txt"], {}, [], ["a: no caption (txt, json) in the tar, only jpg, caption.txt"], []),
        (["22.05.png"], {}, [], ["22.05: no caption (txt, json) in the tar, only png"], []),
        (["22.05.txt", "22.cls"], {}, [], ["22.05: no image"], []),
        (["22.05.png", "22.05.seg.png", "22.05.txt"], {}, ["22.05"], [], ["22.05.seg.png"]),
        (
            ["v1.2.png", "v1.2.txt", "v1.2.caption.txt", "v1.3.png"],
            {},
            ["v1.2"],
            ["v1.3: no cap"],
            ["v1.2.caption.txt"],
        ),
        (["22.05.png", "22.txt"], {}, [], ["22: no image"], []),
        (["a.seg.png", "b.seg.png"], {}, [], ["a.seg: no caption", "b.seg: no caption"], []),
        (["a.gif", "a.txt"], {}, [], ["a: no image (jpg, jpeg, png, webp) in the tar, only gif, txt"], []),
        (["x.jpg.txt", "x.jpg"], {}, [], ["x: no caption (txt, json) in the tar, only jpg.txt, jpg"], []),
        (["22.05.png", "22.05.txt", "22.05.png"], {}, [], ["22.05: a member of the same name is in the tar twice"], []),
        # What is in no sample is counted
        (["a.jpg", "a.png", "a.txt"], {}, ["a"], [], ["a.png"]),
        (["a.jpg", "a.txt", "a.long.txt"], {}, ["a"], [], ["a.long.txt"]),
        (["a.gif", "b.tar.tiff", "c.HEIC", "d.1.bmp"], {}, [], [], ["a.gif", "b.tar.tiff", "c.HEIC", "d.1.bmp"]),
        (["a.caption"], {}, [], [], ["a.caption"]),
        (["a.png", "b.jpg", "b.txt"], {"image": "jpg"}, ["b"], [], ["a.png"]),
        (["a.txt", "b.jpg", "b.json"], {"caption": "json"}, ["b"], [], ["a.txt"]),
        (["b.jpg", "b.png", "b.json", "b.txt"], {"image": "jpg", "caption": "json"}, ["b"], [], []),
        # Names that are none of a user's
        (["./a.jpg", "a.txt", "././b.jpg", "./b.txt"], {}, ["a", "b"], [], []),
        ([".a.jpg", "x/.b.txt", "._c.jpg", "__MACOSX/x/d.jpg", "x/__MACOSX/e.txt", "README"], {}, [], [], []),
        (["1/a.b.png", "2/a.b.txt"], {}, [], ["1/a.b: no caption", "2/a.b: no image"], []),
        (["a..png", "a..txt"], {}, ["a."], [], []),
    ],
)
def test_every_member_of_a_tar_is_accounted_for(tmp_path, names, options, samples, damaged, not_used):
    # A tar without a good sample is an error
    names = [*names, f"whole.{options.get('image', 'jpg')}", f"whole.{options.get('caption', 'txt')}"]
    source = open_tar(tmp_path, names, **options)
    assert list(good(source)) == [*samples, "whole"]
    found = list(problems(source).values())
    assert len(found) == len(damaged)
    assert all(f.startswith(f"a.tar/{start}") for f, start in zip(found, damaged, strict=True)), found
    named = [name for of_kind in source.unused for name in of_kind.names]
    assert sorted(named) == sorted(f"a.tar/{name}" for name in not_used)


def test_any_tar_of_odd_names_accounts_for_all_of_them(tmp_path):
    rng = np.random.default_rng(0)
    stems = ["a", "a.b", "a.b.c", "b", "x/a", "x/a.b"]
    suffixes = [*IMAGE_SUFFIXES, "seg.png", "JPG", "gif", "txt", "json", "TXT", "note.txt"]
    every = [f"{stem}.{suffix}" for stem, suffix in itertools.product(stems, suffixes)]
    for _ in range(150):
        names = [*rng.permutation(every)[: int(rng.integers(1, 9))].tolist(), "zz.jpg", "zz.txt"]
        source = open_tar(tmp_path, names)
        found = problems(source)
        ids = {source[i].sample_id for i in range(len(source)) if i not in found}
        ids |= {text.partition(": ")[0] for text in found.values()}
        named = [name for of_kind in source.unused for name in of_kind.names]
        for name in names:
            parts = name.split(".")
            starts = {"a.tar/" + ".".join(parts[:i]) for i in range(1, len(parts))}
            assert starts & ids or f"a.tar/{name}" in named, (name, names, ids, named)


def test_links_in_a_tar_are_named(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (("d.jpg", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE), ("h.txt", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere"
            tar.addfile(info)
        for name, data in pairs(0, 1):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    source = WebDataset(str(tmp_path / "a.tar"))
    assert list(good(source)) == ["0000"] and not problems(source)
    assert [(u.count, u.names) for u in source.unused] == [(2, ["a.tar/l.jpg", "a.tar/h.txt"])]


def test_the_index_keeps_what_is_not_used(tmp_path, monkeypatch):
    first = open_tar(tmp_path, ["a.jpg", "a.txt", *(f"{i}.gif" for i in range(7))])
    monkeypatch.setattr("lmfusion.data.sources.webdataset.index_tar", None)
    again = WebDataset(str(tmp_path / "a.tar"))
    assert again.unused == first.unused != []
    assert describe_unused(again, "tar") == [
        "tar: files that look like images or captions and are not used: 7",
        "       7  .gif files; JPEG, PNG and WEBP are read: a.tar/0.gif, a.tar/1.gif, a.tar/2.gif, ...",
    ]


# Folders


def fill(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data_of(name))


def open_folder(folder):
    return load_source(SourceConfig("folder", str(folder)), 8)


def test_every_file_of_a_folder_is_accounted_for(tmp_path):
    names = ["22.05.png", "22.05.txt", "v1.2.JPG", "v1.2.TXT", "two.png", "two.jpg", "two.txt", "alone.webp"]
    names += ["x.gif", "x.txt", "sub.jpg/y.heic", "sub.jpg/z.png", "sub.jpg/z.txt", "k.png", "k.caption", "README.txt"]
    names += [".hidden.png", "__MACOSX/m.png", "t.png", "t.TXT", "t.txt", "notes.md"]
    fill(tmp_path / "set", names)
    source = open_folder(tmp_path / "set")
    samples = ["22.05.png", "sub.jpg/z.png", "t.png", "two.jpg", "two.png", "v1.2.JPG"]
    found = problems(source)
    assert [source[i].sample_id for i in range(len(source)) if i not in found] == samples
    assert [text.partition(":")[0] for text in found.values()] == ["alone.webp", "k.png"]
    assert unused(source) == {
        ".caption files; captions are read from .txt files": (1, ["k.caption"]),
        ".gif files; JPEG, PNG and WEBP are read": (1, ["x.gif"]),
        ".heic files; JPEG, PNG and WEBP are read": (1, ["sub.jpg/y.heic"]),
        "captions without an image of the same name": (2, ["README.txt", "x.txt"]),
        "further captions of a sample": (1, ["t.TXT"]),
    }


def test_images_that_the_metadata_do_not_name_are_counted(tmp_path):
    fill(tmp_path, ["a.png", "b.png", "sub/c.jpg", "d.gif"])
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "./a.png", "text": "a"}))
    assert unused(open_folder(tmp_path)) == {
        "images that metadata.jsonl does not name": (2, ["b.png", "sub/c.jpg"]),
        ".gif files; JPEG, PNG and WEBP are read": (1, ["d.gif"]),
    }


def test_links_to_folders_are_followed_once_and_never_in_circles(tmp_path):
    fill(tmp_path, ["set/a.png", "set/a.txt", "set/deep/b.png", "set/deep/b.txt"])
    fill(tmp_path, ["elsewhere/c.png", "elsewhere/c.txt", "elsewhere/in/d.png", "elsewhere/in/d.txt"])
    for link, target in {
        "set/link": "elsewhere",
        "set/again": "elsewhere",  # the first by name is followed
        "set/alias": "set/deep",  # read at its own place
        "set/deep/circle": "set",
        "set/up": "",
        "elsewhere/in/back": "set",
        "elsewhere/round": "elsewhere",
        "set/nowhere.png": "gone.png",
    }.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    (tmp_path / "set" / "self").symlink_to("self")
    (tmp_path / "set" / "nowhere.txt").write_text("its image is gone")
    source = open_folder(tmp_path / "set")
    assert list(problems(source)) == [4]
    assert [source[i].sample_id for i in range(len(source))] == [
        "a.png",
        "again/c.png",
        "again/in/d.png",
        "deep/b.png",
        "nowhere.png",
    ]
    chain = tmp_path / "chain"
    for i in range(40):  # 2 ** 40 paths
        (chain / str(i)).mkdir(parents=True)
        if i:
            for name in "xy":
                (chain / str(i - 1) / name).symlink_to(chain / str(i))
    fill(chain / "39", ["e.png", "e.txt"])
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "s").symlink_to(chain / "0")
    assert len(open_folder(tmp_path / "start")) == 1


def test_a_folder_without_any_caption_is_an_error(tmp_path):
    fill(tmp_path, ["a.png", "b.png", "c.txt"])
    with pytest.raises(
        ValueError, match=r"images in .* must have captions, but none of 2 has: a.png: no caption; write it to a .txt"
    ):
        open_folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n[]\n')
    with pytest.raises(ValueError, match=r"none of 2 has: metadata.jsonl, line 1: the line must be an object"):
        open_folder(tmp_path)


# What says so


@pytest.fixture
def recipe(tiny_llama, tmp_path):
    fill(tmp_path / "set", ["a.png", "a.txt", "b.gif", "b\x1b[31m\n.txt"])
    values = {
        "output": str(tmp_path / "run"),
        "model": {
            "base": str(tiny_llama),
            "image": {"hidden_size": 16, "patch_coder": {"kind": "linear", "patch_size": 2}},
            "codec": {"channels": 1, "image_size": 8},
        },
        "data": {"sources": [{"kind": "folder", "path": str(tmp_path / "set")}], "seq_len": 128, "pack_window": 8},
        "train": {"num_steps": 1, "batch_tokens": 128, "warmup_steps": 1},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("command", ["check", "count", "show", "encode", "train"])
def test_every_command_names_what_is_not_used(recipe, tmp_path, capsys, command):
    arguments = {
        "encode": ["encode", str(recipe), str(tmp_path / "cache")],
        "train": ["train", str(recipe)],
        "show": ["data", "show", str(recipe), "--output", str(tmp_path / "sheet.png")],
    }.get(command, ["data", command, str(recipe)])
    assert main(arguments) == 0
    captured = capsys.readouterr()
    said = captured.out if command in ("check", "count") else captured.err
    assert "files that look like images or captions and are not used: 2\n" in said
    assert ".gif files; JPEG, PNG and WEBP are read: b.gif\n" in said
    assert "captions without an image of the same name: b\\x1b[31m\\n.txt\n" in said and "\x1b[31m" not in said


def test_training_names_them_once_for_each_place(recipe, tmp_path, capsys):
    values = yaml.safe_load(recipe.read_text())
    values["validation"] = {"sources": values["data"]["sources"], "num_samples": 8, "every": 1}
    recipe.write_text(yaml.safe_dump(values))
    assert main(["train", str(recipe)]) == 0
    assert capsys.readouterr().err.count("b.gif") == 2  # of data.sources and of validation.sources
