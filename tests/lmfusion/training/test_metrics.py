"""Lines of metrics, the time they count, the files they lie in, and the loggers beside them."""

import json
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from lmfusion.training.loggers import open_loggers
from lmfusion.training.metrics import TIMINGS, Clock, Metrics, StepMetrics, summarise, take_peak_memory
from lmfusion.training.trainer import Trainer
from lmfusion.utils.json_lines import JsonLines
from tests.lmfusion.training.runs import assert_same_run


def step(**values):
    defaults = dict(
        loss=2.0, lm_loss_sum=30.0, num_labels=10, boi_loss_sum=6.0, num_boi_targets=20, diffusion_loss_sum=4.0,
        num_images=8, grad_norm=1.0, learning_rate=1e-3, num_tokens=90, num_slots=100, num_flops=10**9,
    )  # fmt: skip
    return StepMetrics(**{**defaults, **values})


WHERE = dict(step=2, epoch=0.5, num_samples=20, num_damaged=1, num_cut=0, memory_gb=3.0)


def test_a_line_is_the_mean_over_labels_decisions_images_and_steps():
    steps = [step(), step(loss=4.0, lm_loss_sum=0.0, num_labels=0, num_images=2, num_tokens=50, learning_rate=2e-3)]
    line = summarise(steps, seconds=4.0, data_wait=1.0, peak_flops=1e9, **WHERE)
    assert line == Metrics(
        step=2,
        epoch=0.5,
        loss=3.0,
        lm_loss=3.0,
        boi_loss=0.3,
        diffusion_loss=0.8,
        grad_norm=1.0,
        learning_rate=2e-3,
        num_samples=20,
        packing=0.7,
        num_damaged=1,
        num_cut=0,
        images_per_second=2.5,
        tokens_per_second=35.0,
        mfu=0.5,
        memory_gb=3.0,
        data_wait=0.25,
    )


def test_steps_without_labels_or_images_have_no_such_loss():
    line = summarise(
        [step(num_labels=0, num_boi_targets=0, num_images=0)], seconds=1.0, data_wait=0.0, peak_flops=1.0, **WHERE
    )
    assert line.lm_loss is line.boi_loss is line.diffusion_loss is None and line.images_per_second == 0


def test_timings_are_keys_of_a_line():
    assert set(TIMINGS) < set(Metrics.__dataclass_fields__)


def test_clock_counts_training_and_waiting_alone():
    clock = Clock(seconds=10.0, data_wait=1.0)
    time.sleep(0.02)
    assert clock.so_far() == (10.0, 1.0), "not started yet"
    clock.start()
    with clock.waiting():
        time.sleep(0.02)
    with clock.paused():
        time.sleep(0.5)
    seconds, data_wait = clock.take()
    assert 10.02 <= seconds < 10.4 and 1.02 <= data_wait < 1.4
    assert clock.take()[1] == 0.0


def test_memory_on_a_cpu_is_that_of_the_process():
    assert 0.1 < take_peak_memory(torch.device("cpu")) < 1000


def test_json_lines_forget_what_lies_beyond_a_step(tmp_path):
    lines = JsonLines(tmp_path / "x.jsonl")
    lines.resume(0)
    for number in (1, 2, 2, 3):
        lines.append({"step": number})
    lines.resume(2)
    lines.append({"step": 3, "new": True})
    lines.sync()
    lines.close()
    assert [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 2},
        {"step": 3, "new": True},
    ]


def test_tensorboard_gets_every_number_and_picture(config):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    validation = {"sources": [{"kind": "digits", "split": "test"}], "every": 2, "num_samples": 8}
    sample = {"prompts": ["one"], "every": 4, "num_steps": 2}
    run = config(train__num_steps=4, train__tensorboard=True, train__log_every=2, validation=validation, sample=sample)
    Trainer(run).run(max_steps=2)
    assert Trainer(run).run()
    events = event_accumulator.EventAccumulator(str(Path(run.output) / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (Path(run.output) / "metrics.jsonl").read_text().splitlines()]
    for name in lines[0].keys() - {"step"}:
        written = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert written == [(line["step"], pytest.approx(line[name])) for line in lines], name
    assert [event.step for event in events.Scalars("validation/diffusion_loss_at_937")] == [2, 4]
    assert [event.step for event in events.Images("samples")] == [4]


class FakeRun:
    def __init__(self, **options):
        self.options, self.logged, self.is_finished = options, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.is_finished = True


def test_wandb_continues_the_run_of_the_folder(config, monkeypatch, unbroken):
    runs = []
    wandb = types.SimpleNamespace(init=lambda **options: runs.append(FakeRun(**options)) or runs[-1], Image=str)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = config("logged", train__wandb="drawings", sample={"prompts": ["one"], "every": 6, "num_steps": 2})
    Trainer(run).run(max_steps=5)
    assert Trainer(run).run()
    first, second = runs
    assert first.options["project"] == "drawings" and first.options["config"]["train"]["num_steps"] == 12
    assert first.options["id"] == second.options["id"] and second.options["resume"] == "allow"
    steps = [number for each in runs for number, values in each.logged if "train/loss" in values]
    assert steps == list(range(1, 13))
    assert ("samples" in values for number, values in second.logged if number == 6)
    assert first.is_finished and second.is_finished
    assert_same_run(unbroken, run)  # logging and drawing change no number


@pytest.mark.parametrize(
    ("package", "key", "value", "install"),
    [("torch.utils.tensorboard", "train__tensorboard", True, "tensorboard"), ("wandb", "train__wandb", "x", "wandb")],
)
def test_a_missing_package_is_named(config, monkeypatch, package, key, value, install):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"pip install {install}"):
        open_loggers(config(**{key: value}), step=0)


@pytest.mark.parametrize("lost", [b"\0" * 20, b'{"step": 3, "lo', b"[]", b"\xff"])
def test_lines_that_a_power_failure_left_are_dropped_but_none_before_the_checkpoint(tmp_path, lost):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + lost + b'\n{"step": 4}\n{"st')
    JsonLines(path).resume(2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(b'{"step": 1}\n' + lost + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"lines\.jsonl is damaged at line 2, before lines of steps up to 2; restore"):
        JsonLines(path).resume(2)
