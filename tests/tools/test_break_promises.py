"""Every fragment of code that tests/break_promises.py replaces is in its file once, so that the script can run."""

from pathlib import Path

import pytest

from tests.break_promises import BREAKAGES

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.promise)
def test_a_fragment_is_there_once(breakage):
    assert (ROOT / breakage.path).read_text().count(breakage.right) == 1
    test_file = breakage.test.split("::")[0]
    assert (ROOT / test_file).is_file()
