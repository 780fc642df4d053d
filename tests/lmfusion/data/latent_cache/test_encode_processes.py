"""Several processes encode into one folder, and die at any moment: the cache is the same to the byte."""

import os
import random
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import pytest

from lmfusion.data.latent_cache.shard_encoder import ShardEncoder
from lmfusion.model.codec import CodecConfig
from tests.lmfusion.data.latent_cache.caches import SIZE, encode, write_folder

PIXELS = CodecConfig(image_size=SIZE)


@pytest.fixture
def encode_to(tmp_path, tokenizer):
    """Encodes 12 samples, two of them damaged, into a folder: 4 shards by default."""
    source = write_folder(tmp_path / "images", num=12)

    def encode_to(folder, shard_samples=3):
        encode(source, folder, PIXELS, tokenizer, shard_samples=shard_samples, num_workers=1, max_damaged=1.0)

    return encode_to


@pytest.fixture
def expected(tmp_path, encode_to):
    encode_to(tmp_path / "unbroken")
    return contents(tmp_path / "unbroken")


def test_a_finished_cache_is_manifest_and_shards(expected):
    assert sorted(expected) == [".lock", "manifest.json", *(f"shard-0000000{i}.safetensors" for i in range(4))]
    assert not expected[".lock"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(work):
    """`work` in a process of its own; answers with its id. A fork, since importing torch takes seconds."""
    process = os.fork()
    if process == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return process


def end(process):
    """0, an exit code, or the negative number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def die_at(event_number, folder, work):
    """`work`, killed as it is about to touch the files of `folder` for the `event_number`th time."""
    count = 0

    def hook(event, args):
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.chmod") and str(args[0]).startswith(str(folder)):
            count += 1
            if count == event_number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    work()


def test_killed_before_every_access_to_a_file(tmp_path, encode_to):
    encode_to(tmp_path / "unbroken", shard_samples=6)
    for event_number in range(1, 100):
        folder = tmp_path / str(event_number)
        code = end(start(partial(die_at, event_number, folder, partial(encode_to, folder, shard_samples=6))))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        encode_to(folder, shard_samples=6)
        assert contents(folder) == contents(tmp_path / "unbroken"), event_number
    assert code == 0 and event_number > 30


def logged(monkeypatch, log: Path, seconds=0.1):
    """Let every process write down which shards it begins, and take its time for them."""
    original = ShardEncoder.encode

    def encode_slowly(self, number, report):
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {number}\n")
        time.sleep(seconds)
        return original(self, number, report)

    monkeypatch.setattr(ShardEncoder, "encode", encode_slowly)


def test_killed_at_random_moments_until_done(tmp_path, encode_to, expected, monkeypatch):
    logged(monkeypatch, tmp_path / "log")
    chance = random.Random(0)
    codes = [-signal.SIGKILL]
    while codes[-1] != 0 and len(codes) < 100:
        process = start(partial(encode_to, tmp_path / "cache"))
        time.sleep(chance.random() * 0.3)
        os.kill(process, signal.SIGKILL)
        codes.append(end(process))
    assert codes[1] == -signal.SIGKILL  # four shards take longer
    encode_to(tmp_path / "cache")
    assert contents(tmp_path / "cache") == expected


def test_processes_share_the_work(tmp_path, encode_to, expected, monkeypatch):
    logged(monkeypatch, tmp_path / "log")
    processes = [start(partial(encode_to, tmp_path / "cache")) for _ in range(3)]
    assert [end(process) for process in processes] == [0, 0, 0]
    assert contents(tmp_path / "cache") == expected
    workers, numbers = zip(*(line.split() for line in (tmp_path / "log").read_text().splitlines()), strict=True)
    assert sorted(numbers) == ["0", "1", "2", "3"]  # each once
    assert len(set(workers)) > 1


def test_the_shard_of_a_killed_process_is_taken_over(tmp_path, encode_to, expected, monkeypatch):
    monkeypatch.setattr("lmfusion.data.latent_cache.encode.POLL_SECONDS", 0.05)
    log = tmp_path / "log"
    logged(monkeypatch, log, seconds=30)
    stuck = start(partial(encode_to, tmp_path / "cache"))
    while not log.exists():
        time.sleep(0.01)
    monkeypatch.undo()
    monkeypatch.setattr("lmfusion.data.latent_cache.encode.POLL_SECONDS", 0.05)
    waiting = start(partial(encode_to, tmp_path / "cache"))
    while len(list((tmp_path / "cache").glob("shard-*.json"))) < 3:
        time.sleep(0.01)
    assert os.waitpid(waiting, os.WNOHANG) == (0, 0)  # it waits for the shard that is not its own
    os.kill(stuck, signal.SIGKILL)
    assert (end(stuck), end(waiting)) == (-signal.SIGKILL, 0)
    assert contents(tmp_path / "cache") == expected


def test_a_shard_that_lost_its_end_is_encoded_again(tmp_path, encode_to, expected, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("lmfusion.data.latent_cache.encode._finish", lambda *_: None)
        encode_to(tmp_path / "cache")
    shard = tmp_path / "cache/shard-00000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    (tmp_path / "cache/shard-00000002.json").write_text("{")
    encode_to(tmp_path / "cache")
    assert contents(tmp_path / "cache") == expected


def test_a_file_system_without_locks_is_reported(tmp_path, encode_to, expected, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("lmfusion.data.latent_cache.encode.fcntl.lockf", no_locks)
    encode_to(tmp_path / "cache")
    assert contents(tmp_path / "cache") == expected
    assert "cannot be locked (Function not implemented): start one process only" in capsys.readouterr().err


def test_a_full_disk_is_reported_and_overcome(tmp_path, encode_to, expected, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lmfusion.data.latent_cache.encode.save", full)
        with pytest.raises(OSError, match=r"shard-00000000.*No space left on device; make room"):
            encode_to(tmp_path / "cache")
    encode_to(tmp_path / "cache")
    assert contents(tmp_path / "cache") == expected
