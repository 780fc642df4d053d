"""Checkpoints are complete or absent, and damage is named."""

import errno
import shutil

import pytest
import safetensors
import torch

from lmfusion.training import checkpoint
from lmfusion.training.checkpoint import checkpoint_path, list_steps, load_checkpoint, save_checkpoint


def save(folder, step, keep_last=2):
    parts = {
        "weights": {"a": torch.full((3,), float(step)), "b": torch.ones(2, 2)[:, :1]},
        "ema": {"a": torch.zeros(3)},
    }
    return save_checkpoint(folder, step, parts, {"note": [0.1, None]}, keep_last)


def test_round_trip(tmp_path):
    path = save(tmp_path, 7)
    parts, state = load_checkpoint(path)
    assert parts["weights"]["a"].tolist() == [7, 7, 7] and parts["weights"]["b"].shape == (2, 1)
    assert state == {"step": 7, "note": [0.1, None]}
    assert set(parts) == {"weights", "ema"}


def test_only_the_last_are_kept(tmp_path):
    for step in (5, 10, 15, 100000000):
        save(tmp_path, step)
    assert list_steps(tmp_path) == [15, 100000000]
    assert list_steps(tmp_path / "nowhere") == []


def test_older_checkpoints_are_deleted_only_after_the_new_one_is_in_place(tmp_path, monkeypatch):
    save(tmp_path, 1, keep_last=1)
    seen = []
    real = shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **k: (seen.append((path.name, list_steps(tmp_path))), real(path, **k))
    )
    save(tmp_path, 2, keep_last=1)
    assert (checkpoint_path(tmp_path, 1).name, [1, 2]) in seen
    assert list_steps(tmp_path) == [2]


def test_a_complete_checkpoint_is_not_rewritten(tmp_path):
    before = (save(tmp_path, 3) / checkpoint.MANIFEST).stat().st_mtime_ns
    assert (save(tmp_path, 3) / checkpoint.MANIFEST).stat().st_mtime_ns == before


@pytest.mark.parametrize("failing", ["weights.safetensors", "ema.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("error", ["oserror", "safetensors"])
def test_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, failing, error):
    save(tmp_path, 1)
    real = checkpoint._write

    def write(path, write):
        if path.name == failing:
            path.write_bytes(b"half a fi")
            if error == "oserror":
                raise OSError(errno.ENOSPC, "No space left on device")
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        return real(path, write)

    monkeypatch.setattr(checkpoint, "_write", write)
    with pytest.raises(OSError, match=r"cannot write .*step-00000002: .*No space left.*step 1 is intact\. Make room"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert load_checkpoint(checkpoint_path(tmp_path, 1))[1]["step"] == 1


def test_killed_while_saving_is_as_if_it_had_not_begun(tmp_path, monkeypatch):
    save(tmp_path, 1)

    class Killed(BaseException):
        pass

    for name in ("rename", "mkdir"):
        with monkeypatch.context() as patch:
            patch.setattr(f"pathlib.Path.{name}", lambda *_, **__: (_ for _ in ()).throw(Killed()))
            with pytest.raises(Killed):
                save(tmp_path, 2)
        assert list_steps(tmp_path) == [1]
    save(tmp_path, 2)
    assert list_steps(tmp_path) == [1, 2] and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_named(tmp_path, name, damage):
    path = save(tmp_path, 4)
    data = bytearray((path / name).read_bytes())
    if damage == "delete":
        (path / name).unlink()
    else:
        data[0] ^= 0xFF
        (path / name).write_bytes(data if damage == "flip" else data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"{name} is damaged or missing; delete .*step-00000004"):
        load_checkpoint(path)


def test_another_format_is_refused(tmp_path):
    path = save(tmp_path, 4)
    manifest = (path / "manifest.json").read_text().replace('"format": 1', '"format": 2')
    (path / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match="has format 2; this version of lmfusion reads 1"):
        load_checkpoint(path)
