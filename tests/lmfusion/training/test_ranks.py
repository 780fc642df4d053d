"""Several processes train as one does, and a run continues when their number changes or one of them dies."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from lmfusion.cli.train import INTERRUPTED
from lmfusion.training.checkpoint import list_steps
from lmfusion.utils.config_values import to_values
from tests.lmfusion.training.processes import Forks, Kill, read_digests
from tests.lmfusion.training.runs import assert_same_run, read_metrics

ROOT = Path(__file__).parents[3]
NUM_STEPS = 12
LONGER = "train.num_steps=40"
"""Enough steps that a signal comes before the end, however busy the machine is."""


@pytest.fixture
def recipe(config, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(to_values(config())))
    return path


@pytest.fixture(scope="module")
def forks():
    return Forks()


def end(processes, codes):
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == codes


def assert_close_runs(one, other):
    """The lines are equal, up to the order of sums."""
    lines, others = read_metrics(one), read_metrics(other)
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    for line, found in zip(lines, others, strict=True):
        assert line == pytest.approx(found, rel=1e-4), line["step"]


def run_to_end(command):
    """Exit code and output of a program. All processes that it starts are ended too."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams)
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


@pytest.mark.slow
def test_torchrun_trains_on_two_ranks_and_continues_with_one_or_two(config, recipe, forks, tmp_path):
    """On any number of ranks each sequence of each step is the same to the bit, and losses up to the order of sums."""
    digests = {name: tmp_path / f"digests-{name}" for name in ("one", "start", "on one", "on two")}
    one, two = config("one"), config("two")
    alone = forks.start(recipe, [f"output={one.output}"], digests=digests["one"])

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.lmfusion.training.processes", str(digests["start"]), "train", str(recipe)]
    command += [f"output={two.output}", "--max-steps=6"]
    end_code, output = run_to_end(command)
    assert end_code == 0, output[-3000:]
    assert "on 2 x cpu" in output
    end([alone], [0])
    assert list_steps(Path(two.output) / "checkpoints") == [4, 6]
    files = sorted(path.name for path in (Path(two.output) / "checkpoints" / "step-00000006").iterdir())
    assert files == sorted(
        [f"{part}.0000{rank}-of-00002.safetensors" for part in ("ema", "optimizer", "weights") for rank in (0, 1)]
        + ["manifest.json", "state.json"]
    )

    further = {}
    for name, num_ranks in (("on one", 1), ("on two", 2)):
        further[name] = config(name)
        shutil.copytree(two.output, further[name].output)
        overrides = [f"output={further[name].output}"]
        end(forks.start_ranks(recipe, overrides, [None] * num_ranks, digests=digests[name]), [0] * num_ranks)
        assert_close_runs(one, further[name])
        assert (Path(further[name].output) / "model" / "model.safetensors").is_file()
        assert read_digests(digests["start"]) | read_digests(digests[name]) == read_digests(digests["one"])
        assert len(read_digests(digests[name])) == 6


@pytest.fixture
def unbroken_on_two(config, recipe, forks):
    run = config("unbroken")
    end(forks.start_ranks(recipe, [f"output={run.output}", LONGER]), [0, 0])
    return run


def num_lines(run):
    metrics = Path(run.output) / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all(config, recipe, forks, unbroken_on_two):
    run = config("stopped")
    overrides = [f"output={run.output}", LONGER]
    processes = forks.start_ranks(recipe, overrides)
    while num_lines(run) < 3:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.001)
    os.kill(processes[1].pid, signal.SIGTERM)
    end(processes, [INTERRUPTED, INTERRUPTED])
    steps = list_steps(Path(run.output) / "checkpoints")
    assert 3 <= steps[-1] < 40 and num_lines(run) == steps[-1]
    end(forks.start_ranks(recipe, overrides), [0, 0])
    assert_same_run(unbroken_on_two, run, 40)


@pytest.mark.slow
def test_ranks_killed_while_saving(config, recipe, forks, unbroken_on_two):
    """One rank dies while it writes, or while rank 0 completes the checkpoint; torchrun then ends the other."""
    run = config("killed")
    overrides = [f"output={run.output}", "checkpoint.every=2", LONGER]
    for rank, kill in (
        (1, Kill("write", 2, "halfway")),
        (0, Kill("write", 5, "halfway")),
        (0, Kill("rename", 1, "before")),
        (1, Kill("flush", 1, "after")),
        (0, Kill("rename", 1, "after")),
        (0, Kill("rmtree", 1, "halfway")),
    ):
        kills = [kill if i == rank else None for i in range(2)]
        processes = forks.start_ranks(recipe, overrides, kills)
        processes[rank].join(60)
        assert processes[rank].exitcode == -signal.SIGKILL, kill
        processes[1 - rank].kill()
        processes[1 - rank].join(60)
    end(forks.start_ranks(recipe, overrides), [0, 0])
    assert_same_run(unbroken_on_two, run, 40)
    assert not list((Path(run.output) / "checkpoints").glob("*.tmp"))


@pytest.mark.slow
def test_a_full_disk_on_one_rank_stops_all(config, recipe, forks):
    run = config("full")
    processes = forks.start_ranks(recipe, [f"output={run.output}"], [None, Kill("write", 3, "full")])
    end(processes, [2, 2])
    assert list_steps(Path(run.output) / "checkpoints") == []
