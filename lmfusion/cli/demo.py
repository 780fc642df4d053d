"""Adapt SmolLM2-135M, train a narrow image tower on scikit-learn's handwritten digits, draw and caption digits, and
check that the text side did not change by a bit. Minutes on two CPU cores, faster on a GPU.

Writes report.html (open it in a browser), summary.json and digits.png into the output folder. The training run lies in
its subfolder `run`: an interrupted demo continues there, a finished one only draws, captions and reports again.

    lmfusion demo
    lmfusion demo --output runs/other train.num_steps=1000
"""

import argparse

HELP = "the whole chain on real data, with a report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="runs/demo", metavar="DIR", help="where to write (default: runs/demo)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to recipes/digits.yaml")


def run(args: argparse.Namespace) -> int:
    from lmfusion.demo.run import run_demo

    summary = run_demo(args.output, args.overrides)
    return 0 if summary["text_identical"] else 1
