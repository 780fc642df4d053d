"""Runs of two ranks for test_trainer_ranks.py: torchrun starts this with a folder that holds recipe.yaml."""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from lmfusion.training.config import load_config
from lmfusion.training.distributed import World, init_distributed
from lmfusion.training.step import CollectiveError
from lmfusion.training.trainer import Trainer
from tests.lmfusion.training.poison import poison


def run(folder: Path, ranks: World, name: str, *overrides: str) -> Trainer:
    return Trainer(load_config(folder / "recipe.yaml", [f"output={folder / name}", *overrides]), ranks)


def poisoned(folder: Path, ranks: World) -> dict:
    """Rank 1 gets NaN latents in step 5, between two lines."""
    trainer = run(folder, ranks, "poisoned", "train.log_every=3")
    sample_ids = poison(trainer, 5) if ranks.rank == 1 else []
    try:
        trainer.run()
        return {}
    except CollectiveError as error:
        return {"error": str(error), "step": trainer.step, "poisoned": sample_ids}


def unreadable(folder: Path, ranks: World) -> dict:
    """Rank 0 cannot read its data of step 4."""
    trainer = run(folder, ranks, "unreadable")
    real = trainer.loader.steps

    def steps(state, num_steps):
        for i, step in enumerate(real(state, num_steps), 1):
            if i == 4 and ranks.rank == 0:
                raise OSError("no such tar")
            yield step

    trainer.loader.steps = steps
    try:
        trainer.run()
        return {}
    except CollectiveError as error:
        return {"error": str(error), "step": run(folder, ranks, "unreadable").step}


def stopped(folder: Path, ranks: World) -> dict:
    """Only rank 1 gets SIGTERM in step 3."""
    trainer = run(folder, ranks, "stopped")
    real = trainer.optimizer.step

    def step_and_signal(step, *args):
        if step == 2 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(step, *args)

    trainer.optimizer.step = step_and_signal
    return {"finished": trainer.run(), "step": trainer.step, "finished after": run(folder, ranks, "stopped").run()}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.use_deterministic_algorithms(True)
    with init_distributed("cpu") as ranks:
        results = {"finished": run(folder, ranks, "unbroken").run()}
        results |= {check.__name__: check(folder, ranks) for check in (poisoned, unreadable, stopped)}
        (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
