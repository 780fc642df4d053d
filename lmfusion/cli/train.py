"""Train the image side of a model as a recipe describes, or continue the run that the recipe's output folder holds.

Running the same command again resumes from the newest checkpoint, with the numbers of a run that was never stopped.
SIGTERM and Ctrl-C stop at the next step, with a checkpoint. Exit code: 0 finished, 75 interrupted, 2 bad input.

    lmfusion train recipes/digits.yaml
    lmfusion train recipes/digits.yaml train.num_steps=2000 output=runs/long
"""

import argparse

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

    from lmfusion.training.trainer import Trainer

    trainer = Trainer(config)
    millions = sum(weight.numel() for weight in trainer.weights.values()) / 1e6
    print(f"{millions:.2f} M trained parameters on {trainer.model.device}, {len(trainer.loader.source)} images")
    if trainer.step:
        print(f"resuming after step {trainer.step}")
    if not trainer.run(args.max_steps):
        print(f"interrupted after step {trainer.step}; the same command continues")
        return INTERRUPTED
    print(f"trained {trainer.step} steps; the model is in {trainer.folder / 'model'}")
    return 0
