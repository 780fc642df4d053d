"""Evaluate a trained model as a recipe describes: language modelling, image generation, captioning, following prompts.

Writes <output>/eval.json and <output>/index.html after every suite. Running the same command again continues with the
suites that are left; results of the same model and settings are kept. Missing data and weights are reported before
anything slow starts. Exit code: 0 finished, 2 bad input, 130 interrupted.

    lmfusion eval recipes/eval/digits.yaml
    lmfusion eval recipes/eval/digits.yaml model=runs/mine/model output=runs/mine/eval images.num_images=100
    lmfusion eval recipes/eval/coco.yaml images.coco.annotations=captions_val2014.json images.coco.images=val2014
"""

import argparse
import shlex

HELP = "score the language, images and captions of a trained model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file of the evaluation; see recipes/eval/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change a key of the recipe, such as images.num_images=100"
    )


def run(args: argparse.Namespace) -> int:
    from lmfusion.evaluation.config import EvalConfig
    from lmfusion.utils.recipes import read_recipe

    config = read_recipe(EvalConfig, args.recipe, args.overrides)

    from lmfusion.evaluation.results import SuiteResult
    from lmfusion.evaluation.run import PAGE, run_evaluation

    command = shlex.join(["lmfusion", "eval", args.recipe, *args.overrides])
    values = run_evaluation(config, command, log=lambda line: print(line, flush=True))
    for suite in values["suites"].values():
        print(f"\n{suite['suite']}")
        for score in SuiteResult.from_json(suite).scores:
            print(f"  {score.name:60} {score}  ({score.count})")
    print(f"\nopen {config.output}/{PAGE}")
    return 0
