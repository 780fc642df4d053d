"""A run that was stopped, killed or damaged continues to the same numbers; another run is refused."""

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lmfusion import LMFusion
from lmfusion.training import checkpoint
from lmfusion.training.trainer import Trainer
from lmfusion.utils.config_values import from_values, to_values
from lmfusion.utils.files import locked
from tests.lmfusion.training.processes import OPERATIONS, Forks, Kill
from tests.lmfusion.training.runs import assert_same_run, read_metrics, set_format


@pytest.mark.parametrize("stopped_at", [1, 4, 7])
def test_resumed_run_equals_an_unbroken_one(config, unbroken, stopped_at):
    run = config("resumed")
    Trainer(run).run(max_steps=stopped_at)
    again = config("resumed", data__num_workers=3, data__cache_megabytes=0, train__recompute="layer")
    trainer = Trainer(again)
    assert trainer.step == stopped_at
    assert trainer.run()
    assert_same_run(unbroken, run)


def test_resume_between_lines_of_metrics(config):
    whole, broken = config("whole", train__log_every=5), config("broken", train__log_every=5)
    Trainer(whole).run()
    for max_steps in (3, 7, 12):
        Trainer(broken).run(max_steps=max_steps)
    assert [line["step"] for line in read_metrics(whole)] == [5, 10]
    assert_same_run(whole, broken)


def test_a_run_of_the_former_format_is_refused_with_the_way_out(config):
    run = config()
    Trainer(run).run(max_steps=4)
    set_format(Path(run.output) / "checkpoints" / "step-00000004", 2)
    with pytest.raises(
        ValueError, match="start a new run in another folder, or finish this one with the version that began"
    ):
        Trainer(run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_at_the_step_with_a_checkpoint(config, unbroken, number):
    run = config("stopped")
    trainer = Trainer(run)
    real = trainer.optimizer.step

    def step_and_signal(step, *args):
        if step == 5:
            os.kill(os.getpid(), number)
        return real(step, *args)

    trainer.optimizer.step = step_and_signal
    handler = signal.getsignal(number)
    assert trainer.run() is False
    assert signal.getsignal(number) is handler
    assert trainer.step == 6
    assert checkpoint.list_steps(Path(run.output) / "checkpoints") == [4, 6]
    assert not (Path(run.output) / "model").exists()
    assert Trainer(run).run()
    assert_same_run(unbroken, run)


class Life:
    """A run that is started repeatedly in new processes, each with other settings, until it is done."""

    def __init__(self, run, tmp_path, seed):
        self.recipe = tmp_path / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(to_values(run)))
        self.metrics = Path(run.output) / "metrics.jsonl"
        self.draw = random.Random(seed)
        self.forks = Forks()
        self.num_killed = 0

    def num_lines(self):
        return self.metrics.read_bytes().count(b"\n") if self.metrics.exists() else 0

    def start(self, kill=None):
        every, workers = self.draw.choice([1, 2, 3]), self.draw.choice([0, 1, 3])
        return self.forks.start(self.recipe, [f"checkpoint.every={every}", f"data.num_workers={workers}"], kill)

    def kill_inside(self):
        """Killed by itself, in the middle of writing, flushing, renaming or deleting."""
        operation, last = self.draw.choice(list(OPERATIONS.items()))
        self.kill_at(Kill(operation, self.draw.randint(1, last), self.draw.choice(["before", "halfway", "after"])))

    def kill_at(self, kill):
        process = self.start(kill)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, f"{kill} never came"
        self.num_killed += 1

    def kill_outside(self):
        """Killed a few steps and some milliseconds after the start, at an arbitrary place."""
        process = self.start()
        target = self.num_lines() + self.draw.randint(0, 6)
        deadline = time.monotonic() + 60
        while process.is_alive() and self.num_lines() < target:
            assert time.monotonic() < deadline, "the run makes no steps"
            time.sleep(0.0005)
        time.sleep(self.draw.uniform(0, 0.03))
        assert process.is_alive(), "the run is too short for this test"
        process.kill()
        process.join(60)
        self.num_killed += 1

    def finish(self):
        process = self.start()
        process.join(100)
        assert process.exitcode == 0


@pytest.mark.slow
def test_killed_at_twenty_moments(config, tmp_path):
    """SIGKILL while training, saving and exporting; each start has another number of workers and checkpoints."""
    num_steps = 80
    whole, killed = (config(name, train__num_steps=num_steps) for name in ("whole", "killed"))
    assert Trainer(whole).run()
    life = Life(killed, tmp_path, seed=1)
    for i in range(20):
        life.kill_inside() if i % 2 else life.kill_outside()
    for moment in ("before", "after"):
        life.kill_at(Kill("export", 1, moment))
    life.finish()
    assert life.num_killed == 22
    assert len(read_metrics(killed)) == num_steps
    assert_same_run(whole, killed, num_steps)
    for file in ("model.safetensors", "config.json", "base.json"):
        assert (Path(killed.output) / "model" / file).read_bytes() == (Path(whole.output) / "model" / file).read_bytes()
    assert not list((Path(killed.output) / "checkpoints").glob("*.tmp"))


def test_resume_drops_lines_after_the_checkpoint_and_a_torn_one(config, unbroken):
    run = config("torn")
    Trainer(run).run(max_steps=6)
    with open(Path(run.output) / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    assert Trainer(run).run()
    assert_same_run(unbroken, run)


def test_finished_run_has_nothing_to_do(config, unbroken):
    before = read_metrics(unbroken)
    trainer = Trainer(unbroken)
    assert trainer.step == 12
    assert trainer.run()
    assert read_metrics(unbroken) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train__seed": 1}, "train.seed was 0, is 1"),
        ({"train__batch_tokens": 512}, "train.batch_tokens was 256, is 512"),
        ({"train__optimizer": "adamw_8bit"}, "train.optimizer was 'adamw', is 'adamw_8bit'"),
        ({"train__dtype": "bfloat16"}, "train.dtype was 'float32', is 'bfloat16'"),
        ({"data__seq_len": 256}, "data.seq_len was 128, is 256"),
        ({"data__caption_drop": 0.5}, "data.caption_drop was 0.1, is 0.5"),
        ({"data__sources": [{"kind": "digits", "weight": 2.0}]}, "data.sources was .*'weight': 1.0"),
        ({"model__diffusion": {"prediction_type": "epsilon"}}, "model.diffusion was"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(config, change, message):
    Trainer(config()).run(max_steps=1)
    with pytest.raises(ValueError, match=rf"belongs to another run: .*{message}"):
        Trainer(config(**change))


def test_settings_that_may_change_do_not_change_earlier_numbers(config, unbroken):
    """Length, learning rate and intervals: the schedule continues as the new configuration says."""
    run = config("longer")
    assert Trainer(run).run(max_steps=6)
    changed = config("longer", train__num_steps=20, train__log_every=2, checkpoint__every=1, checkpoint__keep_last=5)
    trainer = Trainer(changed)
    assert trainer.step == 6 and trainer.run(max_steps=8)
    assert read_metrics(run)[:6] == read_metrics(unbroken)[:6]
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5, 6, 8]


def test_stages_with_the_text_tower_trained_then_frozen(config):
    """The second stage starts from a changed text tower, which is saved completely and recognised by its digest."""
    first = config("first", train__text_learning_rate_ratio=0.5)
    assert Trainer(first).run()
    adapted = Path(first.output) / "model"

    def second(model):
        values = {"adapted": str(model)}
        run = config("second", train__num_steps=4)
        run.model = from_values(type(run.model), values)
        return run

    assert Trainer(second(adapted)).run()
    again = LMFusion.from_pretrained(Path(second(adapted).output) / "model")
    text = LMFusion.from_pretrained(adapted).text.state_dict()
    assert all(torch.equal(tensor, text[name]) for name, tensor in again.text.state_dict().items())

    untouched = config("untouched", train__num_steps=1, train__warmup_steps=0)
    assert Trainer(untouched).run()
    with pytest.raises(ValueError, match="another base LLM"):
        Trainer(second(Path(untouched.output) / "model"))


def test_resume_with_the_text_tower_trained(config):
    whole, broken = (config(name, train__text_learning_rate_ratio=0.5) for name in ("whole", "broken"))
    assert Trainer(whole).run()
    assert Trainer(broken).run(max_steps=5)
    assert Trainer(broken).run()
    assert_same_run(whole, broken)


def test_two_runs_do_not_share_a_folder(config):
    first, second = Trainer(config()), Trainer(config())
    with locked(first.folder.parent):  # a lock on another folder changes nothing
        first.folder.mkdir()
        with locked(first.folder):
            holder = rf"is in use by another process \(process {os.getpid()} on .*\); wait for it"
            with pytest.raises(OSError, match=holder):
                second.run()
            with locked(first.folder, rank=1):
                pass  # rank 0 holds the lock for all ranks
    assert second.run()


def test_a_run_that_another_has_continued_since_it_was_read(config, unbroken):
    run = config()
    Trainer(run).run(max_steps=4)
    late, longer = Trainer(config(train__learning_rate=5e-3)), Trainer(config(train__num_steps=14))
    assert late.step == longer.step == 4
    assert Trainer(run).run()
    assert late.run() and late.step == 12  # nothing is left to do
    assert_same_run(run, unbroken)
    exported = load_file(Path(run.output) / "model" / "model.safetensors")
    expected = load_file(Path(unbroken.output) / "model" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in exported.items())
    assert longer.run() and longer.step == 14
    assert read_metrics(run)[:12] == read_metrics(unbroken) and len(read_metrics(run)) == 14


def test_a_run_is_not_read_while_another_writes_it(config):
    run = config()
    Trainer(run).run(max_steps=4)
    with locked(Path(run.output)), pytest.raises(OSError, match="in use by another process"):
        Trainer(run)


def test_a_file_system_without_locks_gives_one_warning(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path):
        pass
    assert "cannot be locked (No locks available): make sure that only one run uses it" in capsys.readouterr().err
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"), locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda values: values.update(rms_norm_eps=3e-4), "the LLM's config.json was"),
        ("tokenizer.json", lambda values: values.update(normalizer={"type": "Lowercase"}), "the LLM's tokenizer was"),
    ],
)
def test_tokenizer_and_config_of_the_llm_are_compared(config, tiny_llama, tmp_path, file, change, message):
    other = shutil.copytree(tiny_llama, tmp_path / "other_llama")
    assert Trainer(config(model__base=str(other))).run(max_steps=1)
    values = json.loads((other / file).read_text())
    change(values)
    (other / file).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"belongs to another run: {message}"):
        Trainer(config(model__base=str(other)))


def test_another_base_is_refused(config, tiny_llama, tmp_path):
    Trainer(config()).run(max_steps=1)
    other = tmp_path / "other_llama"
    other.mkdir()
    for file in tiny_llama.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    Trainer(config(model__base=str(other)))  # moved, but the same
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (other / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="belongs to another base LLM"):
        Trainer(config(model__base=str(other)))


@pytest.mark.parametrize("step", [8, 12])
def test_full_disk_while_saving_keeps_the_earlier_checkpoint(config, unbroken, monkeypatch, step):
    """It is reported a few steps later, since training continues meanwhile; at the end, before the run is done."""
    run = config("full")
    real = checkpoint._write_tensors

    def write_tensors(path, tensors):
        if f"step-{step:08d}" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_tensors", write_tensors)
        with pytest.raises(OSError, match=f"No space left on device; the checkpoint of step {step - 4} is intact"):
            Trainer(run).run()
    assert Trainer(run).step == step - 4
    assert Trainer(run).run()
    assert_same_run(unbroken, run)


@pytest.mark.parametrize("name", ["ema.00000-of-00001.safetensors", "manifest.json"])
def test_damaged_checkpoint_is_named_and_the_one_before_it_works(config, unbroken, name):
    run = config("damaged")
    Trainer(run).run()
    path = checkpoint.checkpoint_path(Path(run.output) / "checkpoints", 12)
    (path / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is damaged or missing; delete .*-00000012 to resume from the"):
        Trainer(run)
    shutil.rmtree(path)
    assert Trainer(run).step == 8
    assert Trainer(run).run()
    assert_same_run(unbroken, run)
