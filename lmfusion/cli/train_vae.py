"""Train an autoencoder, which turns images into latents and back, as a recipe describes; or continue such a run.

Running the same command again resumes from the newest checkpoint, with the numbers of a run that was never stopped.
SIGTERM and Ctrl-C stop at the next step, with a checkpoint. Exit code: 0 finished, 75 interrupted, 2 bad input.
The result is a folder for `codec: {kind: autoencoder_kl, path: ...}`.

    lmfusion train-vae recipes/vae.yaml
    lmfusion train-vae recipes/vae.yaml train.batch_size=16 output=runs/small
"""

import argparse

HELP = "train an autoencoder for images as a recipe describes, or resume"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file of the run; see recipes/vae.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change a key of the recipe, such as train.batch_size=16"
    )
    parser.add_argument("--max-steps", type=int, help="stop after so many steps; the schedule stays that of num_steps")


def run(args: argparse.Namespace) -> int:
    from lmfusion.cli.train import INTERRUPTED
    from lmfusion.vae.config import load_vae_config

    if args.max_steps is not None and args.max_steps < 1:
        raise ValueError(f"--max-steps is {args.max_steps}; it must be at least 1")
    config = load_vae_config(args.recipe, args.overrides)

    from lmfusion.vae.trainer import VAETrainer

    trainer = VAETrainer(config)
    millions = sum(weight.numel() for weight in trainer.weights.values()) / 1e6
    print(f"{millions:.2f} M parameters on {trainer.device}, {trainer.loader.num_samples} samples")
    if trainer.step:
        print(f"resuming after step {trainer.step}")
    if not trainer.run(args.max_steps):
        print(f"interrupted after step {trainer.step}; the same command continues")
        return INTERRUPTED
    print(f"trained {trainer.step} steps; the autoencoder is in {trainer.folder / 'autoencoder'}")
    return 0
