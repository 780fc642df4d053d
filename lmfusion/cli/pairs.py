"""Parses NAME=VALUE arguments of the command line."""

import json
from collections.abc import Sequence
from typing import Any


def json_pairs(pairs: Sequence[str], option: str, form: str) -> dict[str, Any]:
    """The names and values of `pairs`. A value that is not JSON is taken as text.

    option, form: the option's name and the expected form, for the error. Raises ValueError for a pair without "=".
    """
    values = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign:
            raise ValueError(f"{option} must be {form}, got {pair!r}")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values
