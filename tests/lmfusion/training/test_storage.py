"""A run that cannot read its data stops before any number changes, and continues to those of a run that could."""

import errno
import os

import pytest
import yaml
from PIL import Image

from lmfusion.cli import main
from lmfusion.training.trainer import Trainer
from lmfusion.utils.config_values import to_values
from tests.lmfusion.training.runs import assert_same_run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("lmfusion.data.storage.files.RETRY_SECONDS", 0.0)
    (tmp_path / "set").mkdir()
    for i in range(60):
        Image.new("L", (8, 8), 4 * i).save(tmp_path / "set" / f"{i:02d}.png")
        (tmp_path / "set" / f"{i:02d}.txt").write_text(f"number {i}" + "!" * (i % 23))
    return str(tmp_path / "set")


def fail(monkeypatch, numbers):
    """Make the reads with these numbers fail."""
    pread, count = os.pread, iter(range(10**9))

    def read(*arguments):
        if next(count) in numbers:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", read)


@pytest.mark.parametrize("numbers", [range(11, 12), range(11, 14), range(200, 203), range(100, 103)])
def test_failing_reads_change_no_number(config, folder, monkeypatch, numbers):
    options = {"data__sources": [{"kind": "folder", "path": folder}], "data__pack_window": 60}
    whole = config("whole", **options)
    run = config("failing", **options, data__num_workers=0, data__cache_megabytes=0)  # one read after another
    Trainer(whole).run()
    with monkeypatch.context() as patched:
        fail(patched, numbers)
        if len(numbers) < 3:
            assert Trainer(run).run()
        else:
            with pytest.raises((OSError, ValueError), match=r"cannot read .*set/\d+\.(txt|png): Input/output error"):
                Trainer(run).run()
            assert not os.path.exists(os.path.join(run.output, "model"))
    assert Trainer(run).run()
    assert_same_run(whole, run)
    assert not os.path.exists(os.path.join(run.output, "damaged.jsonl"))


def test_the_command_names_the_file(config, folder, monkeypatch, tmp_path, capsys):
    run = config("run", data__sources=[{"kind": "folder", "path": folder}], data__pack_window=60)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(to_values(run)))
    fail(monkeypatch, range(20, 10**6))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 2
    error = capsys.readouterr().err
    assert "cannot read" in error and ".txt: Input/output error" in error and "Traceback" not in error
