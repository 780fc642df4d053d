"""NAME=VALUE arguments of the command line."""

import json
from collections.abc import Sequence
from typing import Any


def json_pairs(pairs: Sequence[str], option: str, form: str) -> dict[str, Any]:
    """Names and values of `pairs`. A value that is not JSON is taken as text.

    option, form: what the error says that each must be. Raises ValueError for a pair without "=".
    """
    values = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign:
            raise ValueError(f"{option} is {pair!r}; it must be {form}")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values
