"""Does a run that was stopped, killed or damaged go on to the same numbers, and is another run refused?"""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from lmfusion import LMFusion, cli
from lmfusion.config_values import from_values, to_values
from lmfusion.files import locked
from lmfusion.training import checkpoint
from lmfusion.training.trainer import Trainer
from tests.lmfusion.training.runs import assert_same_run, read_metrics


@pytest.mark.parametrize("stopped_at", [1, 4, 7])
def test_resumed_run_equals_an_unbroken_one(config, unbroken, stopped_at):
    run = config("resumed")
    Trainer(run).run(max_steps=stopped_at)
    again = config("resumed", data__num_workers=3, data__cache_megabytes=0)
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_at_the_step_with_a_checkpoint(config, unbroken, number):
    run = config("stopped")
    trainer = Trainer(run)
    real = trainer.optimizer.step

    def step_and_signal(step):
        if step == 5:
            os.kill(os.getpid(), number)
        return real(step)

    trainer.optimizer.step = step_and_signal
    handler = signal.getsignal(number)
    assert trainer.run() is False
    assert signal.getsignal(number) is handler
    assert trainer.step == 6
    assert checkpoint.list_steps(Path(run.output) / "checkpoints") == [4, 6]
    assert not (Path(run.output) / "model").exists()
    assert Trainer(run).run()
    assert_same_run(unbroken, run)


def test_killed_again_and_again(config, unbroken, tmp_path, monkeypatch):
    """SIGKILL a few steps after each start, wherever that hits, until a start gets to the end."""
    run = config("killed", checkpoint__every=1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(to_values(run)))
    metrics = Path(run.output) / "metrics.jsonl"
    # Forked from a fresh process: this one has threads, which a fork may leave holding a lock
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["lmfusion.training.trainer"])

    def num_lines():
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    num_killed = 0
    while True:
        target = min(num_lines() + 4, 12)
        process = server.Process(target=cli.main, args=(["train", str(recipe)],))
        process.start()
        deadline = time.monotonic() + 60
        while process.is_alive() and num_lines() < target:
            assert time.monotonic() < deadline, "the run makes no steps"
            time.sleep(0.001)
        time.sleep(0.002 * num_killed)  # another moment each time
        if num_lines() >= 12:
            process.join(60)
            break
        process.kill()
        process.join(60)
        num_killed += 1
    assert num_killed >= 2 and process.exitcode == 0
    assert_same_run(unbroken, run)


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
        ({"train__batch_size": 8}, "train.batch_size was 6, is 8"),
        ({"data__caption_drop": 0.5}, "data.caption_drop was 0.1, is 0.5"),
        ({"model__diffusion": {"prediction_type": "epsilon"}}, "model.diffusion was"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(config, change, message):
    Trainer(config()).run(max_steps=1)
    with pytest.raises(ValueError, match=f"belongs to another run: {message}"):
        Trainer(config(**change))


def test_stages_with_the_text_tower_trained_then_frozen(config):
    """The second stage starts from a text tower that is no LLM's any more: it is saved whole, and told from others."""
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


def test_two_runs_do_not_share_a_folder(config):
    first, second = Trainer(config()), Trainer(config())
    with locked(first.folder.parent):  # another folder is no matter
        first.folder.mkdir()
        with locked(first.folder), pytest.raises(OSError, match="another process is training in"):
            second.run()
    assert second.run()


def test_another_dtype_is_refused_by_name(config):
    assert Trainer(config()).run(max_steps=4)
    with pytest.raises(ValueError, match=r"train\.dtype was 'float32', is 'bfloat16'"):
        Trainer(config(train__dtype="bfloat16"))


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


def test_full_disk_while_saving_keeps_the_earlier_checkpoint(config, unbroken, monkeypatch):
    run = config("full")
    real = checkpoint.save_file

    def save_file(tensors, path):
        if "step-00000008" in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", save_file)
        with pytest.raises(OSError, match="No space left on device; the checkpoint of step 4 is intact"):
            Trainer(run).run()
    assert Trainer(run).run()
    assert_same_run(unbroken, run)


def test_damaged_checkpoint_is_named_and_the_one_before_it_works(config, unbroken):
    run = config("damaged")
    Trainer(run).run()
    path = checkpoint.checkpoint_path(Path(run.output) / "checkpoints", 12)
    data = bytearray((path / "ema.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "ema.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"ema\.safetensors is damaged or missing; delete .*step-00000012"):
        Trainer(run)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    assert Trainer(run).step == 8
    assert Trainer(run).run()
    assert_same_run(unbroken, run)
