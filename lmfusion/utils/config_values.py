"""Configuration dataclasses from plain values (YAML, JSON, dicts), and plain values from them."""

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, 120, 120, 120


def short_repr(value: Any) -> str:
    """`repr(value)` for an error message, truncated: a value from a file may be as large as the file, or larger."""
    if isinstance(value, int) and value.bit_length() > 400:
        return f"{hex(value)[:40]}..."  # Python refuses to write very long integers in decimal
    return _REPR.repr(value)


def truncate(text: str, length: int = 500) -> str:
    """`text` for an error message, without the end of a long one."""
    return text if len(text) <= length else f"{text[:length]}..."


def from_values(cls: type[T], value: Any, name: str = "") -> T:
    """An instance of the dataclass `cls`: `value` itself, one read from a (nested) mapping, or the defaults for None.

    Values are checked against the types of the fields. Raises ValueError, naming the key as `name`.key, for one that
    does not exist or is missing, and for a value of the wrong type.
    """
    if isinstance(value, cls):
        return value
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a mapping with the keys {field_names(cls)}, got {short_repr(value)}")
    prefix = f"{name}." if name else ""
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(truncate(str(key), 120), known, n=1)
            meant = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise ValueError(f"unknown key {prefix}{truncate(str(key), 120)}{meant} (known: {', '.join(known)})")
    for key, f in known.items():
        if key not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{prefix}{key} is missing")
    return cls(**{key: _convert(item, hints[key], f"{prefix}{key}") for key, item in value.items()})


def check_type(value: Any, hint: Any, name: str) -> None:
    """Raise ValueError, naming the value, if it is not of the type `hint`. Text is not read as a number here."""
    _convert(value, hint, name, is_strict=True)


def to_values(config: Any) -> dict[str, Any]:
    """Plain values, as YAML and JSON hold them; `from_values` takes them back."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def field_names(cls: Any) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def check_least(config: Any, section: str, **limits: float) -> None:
    """Raises ValueError, naming section.key, for a field of `config` below its limit or not finite. None is allowed."""
    for name, least in limits.items():
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{section}.{name} must be at least {least}, got {value}")


def _convert(value: Any, hint: Any, name: str, is_strict: bool = False) -> Any:
    """`value` as the type `hint`, or ValueError naming the key. is_strict: only an int is taken for a float."""
    if hint is Any:
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        hint = next(arg for arg in args if arg is not type(None))
        origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_values(typing.cast(type, hint), value, name)
    if origin in (list, tuple):
        length = len(args) if origin is tuple and args[-1] is not Ellipsis else None
        if not isinstance(value, (list, tuple)) or length not in (None, len(value)):
            raise ValueError(f"{name} must be a list{f' of {length}' if length else ''}, got {short_repr(value)}")
        return origin(_convert(item, args[0], f"{name}[{i}]", is_strict) for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must map names to values, got {short_repr(value)}")
        return {key: _convert(item, args[1], f"{name}.{key}", is_strict) for key, item in value.items()}
    if (
        hint is float
        and isinstance(value, (int, float) if is_strict else (int, float, str))
        and not isinstance(value, bool)
    ):
        try:
            return float(value)  # YAML reads 1e-4 as text
        except (ValueError, OverflowError):
            pass
    if hint is int and isinstance(value, (float, str)) and not is_strict:
        try:
            number = float(value)
            value = int(number) if number.is_integer() else value
        except ValueError:
            pass
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, hint.__name__)
        raise ValueError(f"{name} must be {kind}, got {short_repr(value)}")
    if isinstance(value, int) and value.bit_length() > 63 and not is_strict:
        raise ValueError(f"{name} must be less than 2**63, got {short_repr(value)}")
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_values(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
