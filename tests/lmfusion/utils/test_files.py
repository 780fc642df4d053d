"""Writing files: whole or not at all, never through a symbolic link, and system errors name the file."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from lmfusion.cli import main
from lmfusion.data.sources.tar_index import Summary, save_index
from lmfusion.images.grid import save_grid
from lmfusion.images.png import save_png
from lmfusion.training.checkpoint import CheckpointWriter, checkpoint_path, load_checkpoint
from lmfusion.training.distributed import World
from lmfusion.utils.files import atomic_write, flush, locked, name_os_errors, new_folder, replace_text
from lmfusion.utils.folders import replace_folder
from lmfusion.utils.hashing import file_sha256
from lmfusion.utils.json_lines import JsonLines

ALONE = World(0, 1, torch.device("cpu"))
PICTURE = Image.new("L", (2, 2))


@pytest.fixture
def victim(tmp_path):
    """A file of somebody else's, elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "elsewhere" / "victim"
    file.write_text("precious")
    return file


def data_show(path):
    assert main(["data", "show", "digits", "--samples", "2", "--output", str(path)]) == 0


@pytest.mark.parametrize("link", ["symbolic", "hard"])
@pytest.mark.parametrize(
    "write",
    [
        lambda path: replace_text(path, "text"),
        lambda path: save_png(path, PICTURE, {}),
        lambda path: save_grid(PICTURE, path),
        data_show,
    ],
    ids=["replace_text", "save_png", "save_grid", "data show"],
)
def test_nothing_is_written_through_a_link_in_the_place_of_the_partial_file(tmp_path, victim, write, link):
    path, partial = tmp_path / "file", tmp_path / "file.partial"
    (os.symlink if link == "symbolic" else os.link)(victim, partial)
    write(path)
    assert victim.read_text() == "precious" and path.is_file() and not path.is_symlink()
    assert not partial.exists() and not partial.is_symlink()


def test_an_exclusive_write_does_not_touch_a_link(tmp_path, victim):
    os.symlink(victim, tmp_path / "a.png.partial")
    with pytest.raises(FileExistsError):
        save_png(tmp_path / "a.png", PICTURE, {}, overwrite=False)
    os.symlink(tmp_path / "nowhere", tmp_path / "b.png.partial")
    with pytest.raises(FileExistsError):
        save_png(tmp_path / "b.png", PICTURE, {}, overwrite=False)
    assert victim.read_text() == "precious" and not (tmp_path / "nowhere").exists()


def test_an_index_is_not_written_through_a_link(tmp_path, victim, monkeypatch):
    monkeypatch.setattr("threading.get_ident", lambda: 1)
    os.symlink(victim, tmp_path / f"i.index.{os.getpid()}-1.partial")
    assert save_index(tmp_path / "i.index", {"a": "b"}, Summary(0, 0, []), b"")
    assert victim.read_text() == "precious" and (tmp_path / "i.index").is_file()


def test_a_lock_does_not_empty_the_file_that_a_link_points_to(tmp_path, victim):
    os.symlink(victim, tmp_path / ".lock")
    with pytest.raises(OSError, match=r"\.lock"), locked(tmp_path):
        pass
    assert victim.read_text() == "precious"


def test_folders_that_are_links_are_refused(tmp_path, victim):
    os.symlink(victim.parent, tmp_path / "new")
    with pytest.raises(OSError, match="must not be a symbolic link, since nothing is written through links; delete it"):
        new_folder(tmp_path / "new")
    os.symlink(victim.parent, tmp_path / f".m.saving-{os.getpid()}")
    with pytest.raises(OSError, match="must not be a symbolic link"):
        replace_folder(tmp_path / "m", lambda folder: (folder / "victim").write_text("x"), lambda name: True)
    os.symlink(victim.parent, tmp_path / "step-00000003.tmp")
    writer = CheckpointWriter(tmp_path, 2, ALONE)
    writer.save(3, {"weights": {"a": torch.zeros(2)}}, {})
    with pytest.raises(OSError, match=r"step-00000003\.tmp must not be a symbolic link"):
        writer.finish()
    assert [path.name for path in victim.parent.iterdir()] == ["victim"] and victim.read_text() == "precious"


def test_two_writers_do_not_mix_their_files(tmp_path):
    path = tmp_path / "file"

    def write_within_a_write():
        with atomic_write(path) as first:
            first.write(b"half of the fir")
            replace_text(path, "second")

    with pytest.raises(OSError, match="is being written by another process too"):
        write_within_a_write()
    assert path.read_bytes() == b"second"
    with atomic_write(path, writer="1") as first:
        first.write(b"first")
        with atomic_write(path, writer="2") as second:
            second.write(b"second")
    assert path.read_bytes() == b"first" and [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with atomic_write(path) as file:
            file.write(b"new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["file"]


# Errors name the file


def failing(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


def test_a_full_disk_under_a_log(tmp_path):
    os.symlink("/dev/full", tmp_path / "metrics.jsonl")
    log = JsonLines(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl") as error:
        log.append({"step": 1})
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
        log.close()


def test_a_log_that_cannot_be_flushed_or_read(tmp_path, monkeypatch):
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.append({"step": 1})
    monkeypatch.setattr("os.fsync", failing(errno.EIO))
    with pytest.raises(OSError, match=r"Input/output error: .*metrics\.jsonl"):
        log.sync()
    with pytest.raises(OSError, match=r"Input/output error: .*config\.yaml"):
        replace_text(tmp_path / "config.yaml", "a: 1")
    with pytest.raises(OSError, match=r"Input/output error: .*metrics\.jsonl"):
        flush(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(Path, "read_text", failing(errno.EIO))
    with pytest.raises(OSError, match=r"Input/output error: .*metrics\.jsonl"):
        log.resume(1)


def test_a_lock_on_a_broken_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", failing(errno.EIO))
    with pytest.raises(OSError, match=r"Input/output error: .*\.lock"), locked(tmp_path):
        pass


def test_errors_that_name_a_file_keep_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"), name_os_errors(tmp_path):
        (tmp_path / "nowhere").read_bytes()
    with pytest.raises(PermissionError, match="file"), name_os_errors(tmp_path / "file"):
        failing(errno.EACCES)()


@pytest.fixture
def saved_step(tmp_path):
    writer = CheckpointWriter(tmp_path / "checkpoints", 2, ALONE)
    writer.save(20, {"weights": {"a": torch.zeros(2)}}, {})
    writer.finish()
    return checkpoint_path(writer.folder, 20)


def test_a_checkpoint_under_the_name_of_another_step(saved_step):
    renamed = saved_step.rename(checkpoint_path(saved_step.parent, 50))
    with pytest.raises(ValueError, match=r"step-00000050 holds step 20; give it that step's name again, or delete it"):
        load_checkpoint(renamed)
    elsewhere = renamed.rename(saved_step.parent / "kept for the paper")
    assert load_checkpoint(elsewhere)[1]["step"] == 20


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "weights.00000-of-00001.safetensors"])
def test_a_checkpoint_that_the_disk_does_not_give(saved_step, monkeypatch, name):
    digest, read = hashlib.file_digest, Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda file, **_: failing(errno.EIO)() if file.name == name else read(file))
    monkeypatch.setattr(
        hashlib,
        "file_digest",
        lambda file, kind: failing(errno.EIO)() if Path(file.name).name == name else digest(file, kind),
    )
    with pytest.raises(OSError, match=rf"Input/output error: .*{name}"):
        load_checkpoint(saved_step)


def test_digest_of_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert file_sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_regular_file_is_not_replaced(tmp_path, kind):
    path = tmp_path / "device.png"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(OSError, match=r"device\.png must be a regular file or not exist; give another name"):
        save_png(path, PICTURE, {})
    assert path.is_fifo() if kind == "pipe" else path.is_dir()
    assert [item.name for item in tmp_path.iterdir()] == ["device.png"]
