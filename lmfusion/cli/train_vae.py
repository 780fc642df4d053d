"""Train an autoencoder, which turns images into latents and back, as a recipe describes; or continue such a run.

Running the same command again resumes from the newest checkpoint, with the numbers of a run that was never stopped.
SIGTERM and Ctrl-C stop at the next step, with a checkpoint. Exit code: 0 finished, 75 interrupted, 2 bad input.
The result is a folder for `codec: {kind: autoencoder_kl, path: ...}`.

    lmfusion train-vae recipes/vae.yaml
    lmfusion train-vae recipes/vae.yaml train.batch_size=16 output=runs/small
"""

import argparse

from lmfusion.cli.train import add_recipe_arguments, check_max_steps, run_training

HELP = "train an autoencoder for images as a recipe describes, or resume"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser, "train.batch_size=16")


def run(args: argparse.Namespace) -> int:
    from lmfusion.vae.config import load_vae_config

    check_max_steps(args.max_steps)
    config = load_vae_config(args.recipe, args.overrides)

    from lmfusion.vae.trainer import VAETrainer

    return run_training(VAETrainer(config), args.max_steps, "autoencoder")
