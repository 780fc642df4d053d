"""Train the image side of a model as a recipe describes, or continue the run in the recipe's output folder.

Running the same command again resumes from the newest checkpoint, with the numbers of a run that was never stopped.
SIGTERM and Ctrl-C stop at the next step, with a checkpoint. Exit code: 0 finished, 75 interrupted, 2 bad input.
Under torchrun it trains on several GPUs; torchrun exits with 1 unless all of its processes exit with 0.

    lmfusion train recipes/digits.yaml
    lmfusion train recipes/digits.yaml train.num_steps=2000 output=runs/long
    torchrun --nproc-per-node 2 -m lmfusion train recipes/emoji.yaml
"""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmfusion.training.trainer import Trainer
    from lmfusion.vae.trainer import VAETrainer

HELP = "train the image side as a recipe describes, or resume"

INTERRUPTED = 75
"""EX_TEMPFAIL: schedulers read it as "run it again"."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser, "train.learning_rate=1e-3")


def add_recipe_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    """The arguments of every command that trains. example: an override, for the help."""
    parser.add_argument("recipe", help="YAML file of the run; see recipes/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"change a key of the recipe, such as {example}"
    )
    parser.add_argument(
        "--max-steps", type=int, metavar="N", help="stop after N steps; the schedule stays that of train.num_steps"
    )


def check_max_steps(max_steps: int | None) -> None:
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"--max-steps must be at least 1, got {max_steps}")


def run(args: argparse.Namespace) -> int:
    from lmfusion.training.config import load_config

    check_max_steps(args.max_steps)
    config = load_config(args.recipe, args.overrides)

    from lmfusion.training.distributed import init_distributed
    from lmfusion.training.trainer import Trainer

    with init_distributed(config.train.device) as world:
        return run_training(Trainer(config, world), args.max_steps, "model")


def run_training(trainer: "Trainer | VAETrainer", max_steps: int | None, result: str) -> int:
    """Train to the end, print what happens on rank 0, and return the exit code.

    result: what the run exports, into the folder of that name.
    """
    world = trainer.world
    log = print if world.rank == 0 else lambda *_: None
    millions = sum(weight.numel() for weight in trainer.weights.values()) / 1e6
    place = f"{world.size} x {world.device.type}" if world.size > 1 else str(world.device)
    log(f"{millions:.2f} M trained parameters on {place}, {trainer.loader.num_samples} samples")
    if trainer.step:
        log(f"resuming after step {trainer.step}")
    if not trainer.run(max_steps):
        log(f"interrupted after step {trainer.step}; the same command continues")
        return INTERRUPTED
    log(f"trained {trainer.step} steps; the {result} is in {trainer.folder / result}")
    return 0
