"""`python -m lmfusion.experiments.demo` is `lmfusion demo`."""

import sys

from lmfusion.cli import main

sys.exit(main(["demo", *sys.argv[1:]]))
