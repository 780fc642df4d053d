"""Reads YAML recipes into configuration dataclasses, and finds the files that they name."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from lmfusion.utils.config_values import field_names, from_values, short_repr
from lmfusion.utils.files import name_os_errors
from lmfusion.utils.yaml_files import read_yaml

T = TypeVar("T")


def read_recipe(cls: type[T], recipe: str | Path, overrides: Iterable[str] = ()) -> T:
    """The dataclass `cls` from a YAML recipe, changed by overrides like "train.num_steps=100" (values are YAML).

    Raises ValueError, naming the key, for an unknown key and for a value of the wrong type or out of range.
    """
    path = Path(recipe)
    if not path.is_file():
        raise ValueError(f"no recipe at {path}")
    try:
        with name_os_errors(path):
            values = read_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no keys; a recipe has {field_names(cls)}")
    for override in overrides:
        _override(values, override)
    return from_values(cls, values)


def _override(values: dict[str, Any], override: str) -> None:
    """Change one key of nested `values`, by "key.sub=value". Raises ValueError for text of another form."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"an override must have the form key.sub=value, got {short_repr(override)}")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"{key}: {parent} is a single value and has no keys below it")
    try:
        values[last] = read_yaml(text)
    except ValueError as error:
        raise ValueError(f"{short_repr(override)}: {error}") from error


def resolve_path(path: str) -> str:
    """`path`, or, for `package:name/file`, the file inside the installed package `name`, which is not imported.

    Raises ValueError if the package is not installed or does not hold the file.
    """
    if not path.startswith("package:"):
        return path
    package, _, file = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{path}: the package {package} is not installed; pip install {package.replace('_', '-')}")
    for location in spec.submodule_search_locations:
        found = Path(location, file)
        if file and found.exists():
            return str(found)
    raise ValueError(f"{path}: the package {package} has no file {file!r}")
