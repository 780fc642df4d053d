"""`lmfusion data`: the contact sheet, the table of damaged samples, the counts, and the exit codes."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lmfusion.cli import main
from lmfusion.data import CaptionedImage, Interleaved, Latents
from lmfusion.data.inspect import by_reason, contact_sheet, read_all
from lmfusion.data.pipeline.documents import SkippedSample
from tests.lmfusion.data.pipeline.loaders import Listed, captioned
from tests.lmfusion.data.storage.stored import encoded, pairs, tar_bytes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """A tar of eight captioned images, two of them damaged, and a folder of one document."""
    members = dict(pairs(0, 8))
    members["0003.jpg"] = members["0003.jpg"][:-50]
    members["0005.txt"] = b""
    (tmp_path / "a.tar").write_bytes(tar_bytes(members.items()))
    (tmp_path / "0.png").write_bytes(encoded("PNG"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"content": ["one", {"image": "0.png"}, "two"]}) + "\n")
    return tmp_path


@pytest.fixture
def recipe(tiny_llama, folder):
    values = {
        "output": str(folder / "run"),
        "model": {
            "base": str(tiny_llama),
            "image": {"hidden_size": 16, "patch_coder": {"kind": "linear", "patch_size": 2}},
            "codec": {"channels": 1, "image_size": 8},
        },
        "data": {
            "sources": [{"kind": "webdataset", "path": str(folder / "a.tar")}],
            "seq_len": 128,
            "pack_window": 8,
        },
        "train": {"num_steps": 3, "batch_tokens": 256, "warmup_steps": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_show_draws_images_and_captions(folder, capsys):
    output = folder / "sheet.png"
    sources = [f"webdataset={folder}/a.tar", f"interleaved={folder}/a.jsonl", "digits"]
    assert main(["data", "show", *sources, "--samples", "12", "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    with Image.open(output) as sheet:
        assert sheet.mode == "RGB" and sheet.width > 6 * 192 and sheet.height > 5 * 192
    assert not list(folder.glob("*.partial"))


def test_a_sheet_holds_every_sample_once_with_its_words():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    samples = [
        CaptionedImage(f"s/{i}", lambda colour=colour: Image.new("RGB", (5, 9), colour), ("a caption",))
        for i, colour in enumerate(colours)
    ]
    sheet = np.asarray(contact_sheet(Listed([*samples, "broken"]), 10, cell=40, num_columns=2))
    for colour in (*colours, (211, 211, 211)):  # the last is the grey of a damaged sample
        assert (sheet == colour).all(-1).sum() == 40 * 40
    below = sheet[48:60, :40]
    assert (below < 100).any() and (sheet[:, -4:] == 255).all()
    again = np.asarray(contact_sheet(Listed([*samples, "broken"]), 2, cell=40, seed=1))
    assert again.shape[1] < sheet.shape[1] + 10 and again.shape[0] < sheet.shape[0]


def test_a_sheet_of_documents_and_of_latents():
    def load():
        return Image.new("RGB", (4, 4), (200, 0, 0))

    document = Interleaved("d", ("before " * 50, load, "between", load, "after"))
    sheet = np.asarray(contact_sheet(Listed([document]), 1, cell=40))
    assert (sheet == (200, 0, 0)).all(-1).sum() == 2 * 40 * 40 and sheet.shape[1] == 3 * 46 + 6
    latents = Latents(torch.zeros(1, 4, 4), None)
    source = Listed([CaptionedImage("e", lambda: latents, (np.array([1, 2], np.int32),))])
    with pytest.raises(ValueError, match="give a recipe"):
        contact_sheet(source, 1)
    read = []
    decoders = dict(decode_latents=lambda x: load(), decode_tokens=lambda ids: read.append(ids.tolist()) or "words")
    assert (np.asarray(contact_sheet(source, 1, cell=40, **decoders)) == (200, 0, 0)).all(-1).sum() == 1600
    assert read == [[1, 2]]


def test_check_names_what_is_damaged_and_exits_with_1(folder, capsys):
    listed = folder / "damaged.jsonl"
    arguments = ["data", "check", f"webdataset={folder}/a.tar", f"interleaved={folder}/a.jsonl"]
    assert main([*arguments, "--workers", "3", "--output", str(listed)]) == 1
    out = capsys.readouterr().out
    assert "8 samples, 6 images, 6 texts of 9.0 characters, 2 damaged" in out
    assert "1 samples, 1 images, 2 texts of 3.0 characters, 0 damaged" in out
    assert "       1  the sample is damaged or truncated: image file is truncated (N bytes not" in out
    assert "- a.tar/0003\n" in out
    assert "       1  .txt: the caption is empty" in out and "- a.tar/0005: .txt: the caption is empty" in out
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [line["sample_id"] for line in lines] == ["a.tar/0003", f"webdataset {folder}/a.tar, sample 5"]
    assert main(["data", "check", f"interleaved={folder}/a.jsonl"]) == 0


def test_reasons_are_told_apart_by_what_they_say():
    damaged = [
        SkippedSample(
            "set/a 1.jpg", "/data/set/a 1.jpg is damaged or truncated: image file is truncated (3 bytes left)"
        ),
        SkippedSample("set/b.jpg", "/data/set/b.jpg is damaged or truncated: image file is truncated (71 bytes left)"),
        SkippedSample("webdataset x, sample 4", "s-1.tar/5: no caption (txt, json) in the tar, only jpg"),
        SkippedSample("webdataset x, sample 9", "s-2.tar/6: no caption (txt, json) in the tar, only jpg"),
        SkippedSample("webdataset x, sample 11", "s-2.tar/9: no caption (txt, json) in the tar, only jpg"),
        SkippedSample("c.png", "/data/c.png is not a regular file; give a JPEG, PNG or WEBP file"),
        SkippedSample("d.png", "[Errno 2] No such file or directory: '/data/d.png'"),
        SkippedSample("e.png", "e.png: no caption; write a .txt file of its name beside it, or use a metadata.jsonl"),
    ]
    assert [(len(of_kind), kind) for kind, of_kind in by_reason(damaged)] == [
        (3, "no caption (txt, json) in the tar, only jpg"),
        (2, "the sample is damaged or truncated: image file is truncated (N bytes left)"),
        (1, "[Errno N] No such file or directory: the sample"),
        (1, "the sample is not a regular file; give a JPEG, PNG or WEBP file"),
        (1, "the sample: no caption; write a .txt file of its name beside it, or use a metadata.jsonl"),
    ]


@pytest.mark.parametrize("num_workers", [1, 5])
def test_reading_all_is_the_same_whatever_the_workers(num_workers):
    def broken():
        raise OSError("gone")

    samples = [captioned(i, caption="x" * (i + 1)) for i in range(100)]
    samples[40] = "no such sample"
    samples[70] = captioned(70, load_image=broken)
    seen = []
    contents = read_all(Listed(samples), "listed", load_images=True, num_workers=num_workers, report=seen.append)
    assert contents.damaged == [SkippedSample("listed, sample 40", "no such sample"), SkippedSample("s/70", "gone")]
    assert (contents.num_samples, contents.num_images, contents.num_texts) == (100, 98, 98) and sum(seen) == 100
    assert contents.num_characters == 5050 - 41 - 71
    texts_alone = read_all(Listed(samples), "listed", load_images=False, num_workers=num_workers)
    assert len(texts_alone.damaged) == 1 and texts_alone.num_images == 99


def test_count_without_a_recipe(folder, capsys):
    assert main(["data", "count", f"webdataset={folder}/a.tar", "--caption", "txt", "--image", "jpg"]) == 0
    out = capsys.readouterr().out
    assert "8 samples, 7 images, 7 texts of 9.0 characters, 1 damaged" in out and "need a recipe" in out


def test_count_with_a_recipe_agrees_with_hand_counting(recipe, capsys):
    assert main(["data", "count", str(recipe), "data.caption_drop=0", "data.image_first=0"]) == 0
    out = capsys.readouterr().out
    # Seven samples with a text: bos, 9 bytes of caption, BOI, 16 tokens of image, EOI; four of them in 128 tokens
    assert "one epoch, of 8 samples, from 8 that were read" in out
    for line in (
        "tokens      196",
        "  of text   84, with bos, BOI and EOI",
        "  of images 112",
        "sequences   2 of 128 tokens",
        f"packing     {100 * 196 / 256:.2f} %",
        "cut         0 documents",
        "damaged     1 samples",
        "steps       1.0 of 256 tokens",
    ):
        assert line in out, (line, out)


def test_count_from_a_part_of_the_samples(recipe, capsys):
    assert main(["data", "count", str(recipe), "--samples", "4", "data.pack_window=4", "data.caption_drop=0"]) == 0
    out = capsys.readouterr().out
    assert "one epoch, of 8 samples, from 4 that were read" in out and "texts" not in out
    read = int(out.split("damaged     ")[1].split()[0]) // 2  # of the four, scaled to eight
    assert f"tokens      {2 * 28 * (4 - read)}\n" in out


def test_a_recipe_is_checked_and_shown_with_its_overrides(recipe, folder, capsys):
    assert main(["data", "check", str(recipe)]) == 1
    override = f"data.sources=[{{kind: interleaved, path: {folder}/a.jsonl}}]"
    assert main(["data", "check", str(recipe), override]) == 0
    assert main(["data", "show", str(recipe), override, "--output", str(folder / "s.png")]) == 0
    assert (folder / "s.png").is_file() and "interleaved" in capsys.readouterr().out


def test_a_latent_cache_is_shown_checked_and_counted_like_its_images(recipe, folder, capsys):
    images = f"data.sources=[{{kind: interleaved, path: {folder}/a.jsonl}}]"
    assert main(["encode", str(recipe), str(folder / "cache"), images]) == 0
    assert main(["data", "count", str(recipe), images]) == 0
    of_images = capsys.readouterr().out.partition("one epoch")[2]
    latents = f"data.sources=[{{kind: latents, path: {folder}/cache}}]"
    assert main(["data", "count", str(recipe), latents]) == 0
    assert capsys.readouterr().out.partition("one epoch")[2] == of_images != ""
    assert main(["data", "check", f"latents={folder}/cache"]) == 0
    output = str(folder / "s.png")
    assert main(["data", "show", str(recipe), latents, "--output", output]) == 0
    with Image.open(output) as sheet:
        assert sheet.width == 2 * 198 + 6
    assert main(["data", "show", f"latents={folder}/cache", "--output", output]) == 2
    assert main(["data", "show", str(recipe), latents, "model.codec.channels=3", "--output", output]) == 2
    assert "give a recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "webdataset=gone.tar"], "there is no file gone.tar"),
        (["check", "webdataset"], "a path is required"),
        (["check", "digits=x"], "digits, digit_conversations, openmoji, shapes, shape_edits, which take none"),
        (["check", "digits", "x.yaml"], "a source must be kind=path with a kind of"),
        (["check", "gone.yaml"], "no recipe at gone.yaml"),
        (["check", "nokind=a.tar"], "no recipe at nokind=a.tar"),
        (["check", "digits", "--workers", "0"], "--workers must be at least 1, got 0"),
        (["show", "digits", "--samples", "0"], "--samples must be at least 1, got 0"),
        (["count", "digits", "--samples", "9"], "--samples needs a recipe"),
        (["count", "{recipe}", "--image", "jpg"], "--image and --caption need kind=path"),
        (["count", "{recipe}", "data.row_token=3"], "unknown key data.row_token"),
        (["check", "folder={folder}", "--image", "jpg"], "image must only be set for webdataset and parquet"),
    ],
)
def test_bad_arguments(recipe, folder, capsys, arguments, message):
    arguments = [a.format(recipe=recipe, folder=folder) if a.startswith(("{", "folder")) else a for a in arguments]
    assert main(["data", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_action_is_needed(capsys):
    with pytest.raises(SystemExit):
        main(["data"])
    assert "ACTION" in capsys.readouterr().err


EVIL = "evil\x1b[2J\x1b]0;title\x07\n 1  nothing is wrong"


def test_names_in_the_data_cannot_write_on_the_terminal(tmp_path, capsys):
    members = [
        (f"{EVIL}.jpg", b"none"),
        (f"{EVIL}.txt", b"x"),
        (f"b{EVIL}.txt", b"x"),
        (f"{EVIL}.gif", b""),
        *pairs(0, 1),
    ]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    (tmp_path / "set").mkdir()
    for name in (f"{EVIL}.png", "a.png"):
        (tmp_path / "set" / name).write_bytes(b"none")
        (tmp_path / "set" / name).with_suffix(".txt").write_text("x")
    (tmp_path / "set" / f"c{EVIL}.png").write_bytes(b"none")
    line = json.dumps({"id": EVIL, "content": ["x", {"image": f"{EVIL}.png"}]})
    (tmp_path / "a.jsonl").write_text(line + "\n" + json.dumps({"content": ["x", {"image": f"../{EVIL}"}]}))
    sources = [f"webdataset={tmp_path}/a.tar", f"folder={tmp_path}/set", f"interleaved={tmp_path}/a.jsonl"]
    for action in (["check"], ["count"], ["show", "--output", str(tmp_path / "s.png")]):
        main(["data", *action[:1], *sources, *action[1:]])
        captured = capsys.readouterr()
        for said in (captured.out, captured.err):
            assert all(line.isprintable() for line in said.replace("\r", "\n").split("\n")), said
            assert not any(line.startswith(" 1  nothing is wrong") for line in said.splitlines())
    assert main(["data", "check", f"webdataset={tmp_path}/{EVIL}.tar"]) == 2
    assert "\x1b" not in capsys.readouterr().err
