"""Train variants of one recipe, one after the other, measure them in the same way, and compare them.

The recipe names the training run that all variants share (`base`), what each variant changes in it (`variants`), what
is measured (`measure`), and which results are claimed (`claims`); these are reported as found or not found. The
folder `output` then holds one run per variant, and ablation.json, .md, .svg and .png. Running the same command again
continues; finished variants are not trained again. Exit code: 0 finished, 75 interrupted, 2 bad input.

    lmfusion ablate recipes/ablation.yaml
    lmfusion ablate recipes/ablation.yaml output=runs/longer base.train.num_steps=2000 measure.every=200
"""

import argparse

from lmfusion.cli.train import INTERRUPTED

HELP = "train variants of a recipe and compare them in a table and a plot"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file of the ablation; see recipes/ablation.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="change a key of the recipe, such as base.train.learning_rate=1e-4 or measure.every=50",
    )


def run(args: argparse.Namespace) -> int:
    from lmfusion.experiments.ablation.config import AblationConfig
    from lmfusion.utils.recipes import read_recipe

    config = read_recipe(AblationConfig, args.recipe, args.overrides)

    from lmfusion.experiments.ablation.run import run_ablation

    if run_ablation(config) is None:
        print("interrupted; the same command continues")
        return INTERRUPTED
    with open(f"{config.output}/ablation.md", encoding="utf-8") as file:
        print(file.read())
    return 0
