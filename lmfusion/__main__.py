"""`python -m lmfusion` is the command `lmfusion`."""

import sys

from lmfusion.cli import main

sys.exit(main())
