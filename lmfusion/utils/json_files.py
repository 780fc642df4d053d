"""Reads JSON objects from files and bytes, with one form of error."""

import json
from pathlib import Path
from typing import Any

from lmfusion.utils.config_values import short_repr, truncate
from lmfusion.utils.files import name_os_errors


def read_json_object(path: Path, *, strict: bool = True) -> dict[str, Any]:
    """The object in the JSON file `path`. strict: as in `parse_json_object`.

    Raises FileNotFoundError where there is no such file, ValueError naming it where it does not hold an object, and
    other OSErrors with its name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy the whole folder again from its source")
    try:
        with name_os_errors(path):
            return parse_json_object(path.read_bytes(), strict=strict)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {truncate(str(error))}; copy it again from its source") from error


def parse_json_object(content: str | bytes, *, strict: bool = True) -> dict[str, Any]:
    """The object that `content` holds.

    strict: refuse a key given twice, NaN and infinities, as in files that lmfusion wrote itself; files from elsewhere
    may hold them. Raises ValueError for these, and for anything but an object.
    """
    hooks: dict[str, Any] = (
        {"object_pairs_hook": _with_unique_keys, "parse_constant": _refuse_constant} if strict else {}
    )
    try:
        value = json.loads(content, **hooks)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it must hold a JSON object, got {type(value).__name__}")
    return value


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {short_repr(duplicate)} is given twice")
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"numbers must be finite, got {name}")
