"""Runs in separate processes that can be killed: at a given moment from outside, or by themselves during a write.

As a program it is `lmfusion train` that also writes down what it trains on, for torchrun.
"""

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import NamedTuple


class Kill(NamedTuple):
    """SIGKILL at the `number`th call of `operation`: "before", "halfway" or "after" it. "full": a full disk instead."""

    operation: str
    number: int
    moment: str


OPERATIONS = {"write": 12, "flush": 6, "rename": 3, "replace": 1, "rmtree": 1}
"""Operations of a run on its files, and how often each occurs at least in about ten steps."""


class Forks:
    """Starts processes from one that has imported everything: this one has threads, whose locks a fork would copy."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["lmfusion.training.trainer", "tests.lmfusion.training.processes"])

    def start(self, recipe, overrides=(), kill=None, environment=(), digests=None, max_steps=None):
        arguments = ["train", str(recipe), *overrides]
        if max_steps is not None:
            arguments += ["--max-steps", str(max_steps)]
        process = self._context.Process(target=train, args=(arguments, kill, dict(environment), digests), daemon=True)
        process.start()
        return process

    def start_ranks(self, recipe, overrides=(), kills=(None, None), **options):
        """One process per rank, as torchrun would start them."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": str(len(kills)), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        return [
            self.start(recipe, overrides, kill, {**shared, "RANK": str(i), "LOCAL_RANK": str(i)}, **options)
            for i, kill in enumerate(kills)
        ]


def train(arguments, kill=None, environment=(), digests=None):
    from lmfusion import cli

    os.environ.update(environment)
    if kill is not None:
        inject(kill)
    if digests is not None:
        write_digests(Path(digests))
    sys.exit(cli.main(arguments))


def inject(kill):
    from lmfusion.training import checkpoint
    from lmfusion.utils import folders

    owner, name = {
        "write": (checkpoint, "_write"),
        "flush": (checkpoint, "flush"),
        "rename": (os, "rename"),
        "replace": (os, "replace"),
        "rmtree": (shutil, "rmtree"),
        "export": (folders, "_swap"),
    }[kill.operation]
    real = getattr(owner, name)
    counts, lock = [0], threading.Lock()

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(path, *args, **kwargs):
        with lock:
            counts[0] += 1
            is_due = counts[0] == kill.number
        if not is_due:
            return real(path, *args, **kwargs)
        if kill.moment == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if kill.moment == "halfway" and kill.operation == "write":
            content = b"".join(map(bytes, args[0]))
            path.write_bytes(content[: len(content) // 2])
        elif kill.moment == "halfway" and kill.operation == "rmtree":
            next(iter(path.iterdir())).unlink()
        elif kill.moment == "after":
            real(path, *args, **kwargs)
        return die()

    setattr(owner, name, counted)


def write_digests(folder):
    """Let this process write a hash of each sequence of each step into its own file in `folder`."""
    from lmfusion.data.pipeline.loader import PackedLoader

    real = PackedLoader.steps
    folder.mkdir(parents=True, exist_ok=True)

    def steps(self, state, num_steps):
        with open(folder / f"{os.getpid()}.jsonl", "w", encoding="utf-8") as file:
            for step in real(self, state, num_steps):
                after = [step.state.window, step.state.sequence]
                file.write(json.dumps([after, [digest(batch) for batch in step.batches]]) + "\n")
                file.flush()
                yield step

    PackedLoader.steps = steps


def digest(batch):
    """sha256 of everything in a batch: tokens, labels, latents, noise, timesteps, layout."""
    sha256 = hashlib.sha256(" ".join(batch.sample_ids).encode())
    layout = batch.layout
    tensors = (batch.token_ids, batch.labels, batch.latents, batch.noise, batch.timesteps)
    tensors += (batch.boi_target_indices, batch.boi_labels)
    for tensor in (*tensors, layout.key_start, layout.key_end, layout.position):
        sha256.update(tensor.contiguous().numpy().tobytes())
    return sha256.hexdigest()


def read_digests(folder):
    """Hashes of the sequences of all ranks by the loader's state after their step, sorted."""
    found = {}
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            after, hashes = json.loads(line)
            found.setdefault(tuple(after), []).extend(hashes)
    return {after: sorted(hashes) for after, hashes in found.items()}


if __name__ == "__main__":
    train(sys.argv[2:], digests=sys.argv[1])
