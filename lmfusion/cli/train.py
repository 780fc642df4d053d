"""Train the image side of a model as a recipe describes, or continue the run that the recipe's output folder holds.

Running the same command again resumes from the newest checkpoint, with the numbers of a run that was never stopped.
SIGTERM and Ctrl-C stop at the next step, with a checkpoint. Exit code: 0 finished, 75 interrupted, 2 bad input.
torchrun trains on several GPUs, and ends with 1 where one of its processes did not end with 0.

    lmfusion train recipes/digits.yaml
    lmfusion train recipes/digits.yaml train.num_steps=2000 output=runs/long
    torchrun --nproc-per-node 2 -m lmfusion train recipes/emoji.yaml
"""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmfusion.training.distributed import World

HELP = "train the image side as a recipe describes, or resume"

INTERRUPTED = 75
"""EX_TEMPFAIL: what schedulers read as "run it again"."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file of the run; see recipes/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change a key of the recipe, such as train.learning_rate=1e-3"
    )
    parser.add_argument("--max-steps", type=int, help="stop after so many steps; the schedule stays that of num_steps")


def run(args: argparse.Namespace) -> int:
    from lmfusion.training.config import load_config

    if args.max_steps is not None and args.max_steps < 1:
        raise ValueError(f"--max-steps is {args.max_steps}; it must be at least 1")
    config = load_config(args.recipe, args.overrides)

    from lmfusion.training.distributed import init_distributed
    from lmfusion.training.trainer import Trainer

    with init_distributed(config.train.device) as ranks:
        trainer = Trainer(config, ranks)
        say = print if ranks.rank == 0 else lambda *_: None
        millions = sum(weight.numel() for weight in trainer.weights.values()) / 1e6
        say(f"{millions:.2f} M trained parameters on {_place(ranks)}, {trainer.loader.num_samples} samples")
        if trainer.step:
            say(f"resuming after step {trainer.step}")
        if not trainer.run(args.max_steps):
            say(f"interrupted after step {trainer.step}; the same command continues")
            return INTERRUPTED
        say(f"trained {trainer.step} steps; the model is in {trainer.folder / 'model'}")
        return 0


def _place(world: "World") -> str:
    return f"{world.size} x {world.device.type}" if world.size > 1 else str(world.device)
