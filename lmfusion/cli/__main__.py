"""`python -m lmfusion.cli`, where the command `lmfusion` is not on the path."""

import sys

from lmfusion.cli import main

sys.exit(main())
