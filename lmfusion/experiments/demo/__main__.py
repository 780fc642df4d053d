"""Runs `lmfusion demo` as `python -m lmfusion.experiments.demo`."""

import sys

from lmfusion.cli import main

sys.exit(main(["demo", *sys.argv[1:]]))
