"""Limits on the texts and numbers that an untrusted Jinja template makes.

A template of a few letters can ask for gigabytes: by repeating and padding texts, by filters, and by powers. Every
operator, method and filter whose result can be larger than its operands is checked here before it runs.
"""

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import SandboxedEnvironment

MAX_CHARS = 2**24
"""Characters of any text, and items of any list, that a template makes."""
MAX_BITS = 2**16
"""Of any integer that a template makes by multiplication."""
MAX_WIDTH = 10_000
"""Of any field, indentation or batch in a template."""
MAX_WRAPPED_CHARS = 2**20
"""Of a text that is broken into lines, which is slow."""

_LONG_NUMBER = re.compile(r"\d{5,}")
_WIDTH_METHODS = ("zfill", "ljust", "rjust", "center", "expandtabs")
_WIDTH_FILTERS = ("center", "indent", "batch", "slice", "wordwrap", "tojson", "truncate")


def limit(environment: SandboxedEnvironment) -> None:
    """Put the limits into an environment of templates, which must not be shared."""
    environment.intercepted_binops = frozenset(("+", "*", "**", "%"))
    environment.binop_table = {
        **environment.binop_table, "+": _add, "*": _multiply, "**": _power, "%": _modulo
    }  # fmt: skip
    call = environment.call

    def limited_call(context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        _check_method(function, args, kwargs)
        return call(context, function, *args, **kwargs)

    environment.call = limited_call  # type: ignore[method-assign]
    environment.concat = _concat  # type: ignore[method-assign]
    environment.filters = {
        name: _limited_filter(name, function) if name in _FILTERS else function
        for name, function in environment.filters.items()
    }


def check_chars(number: int) -> None:
    """Raises TemplateError for a text or list that is longer than MAX_CHARS."""
    if number > MAX_CHARS:
        raise TemplateError(f"a text or list may have at most {MAX_CHARS} characters or items, got {number}")


def _check_bits(number: int) -> None:
    if number > MAX_BITS:
        raise TemplateError(f"an integer may have at most {MAX_BITS} bits, got {number}")


def _check_widths(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_WIDTH:
            raise TemplateError(f"a width may be at most {MAX_WIDTH}, got {value}")


def _concat(pieces: Iterable[str]) -> str:
    pieces = list(pieces)
    check_chars(sum(map(len, pieces)))
    return "".join(pieces)


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
        check_chars(len(left) + len(right))
    return operator.add(left, right)


def _multiply(left: Any, right: Any) -> Any:
    for several, times in ((left, right), (right, left)):
        if isinstance(several, (str, list, tuple)) and isinstance(times, int):
            check_chars(len(several) * times)
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    return operator.mul(left, right)


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * abs(right))
    return operator.pow(left, right)


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        _check_format(left, right if isinstance(right, tuple) else (right,), "*" in left)
    return operator.mod(left, right)


def _check_format(form: str, values: Iterable[Any], takes_widths: bool) -> None:
    """takes_widths: whether a width may come from the values."""
    if _LONG_NUMBER.search(form):
        raise TemplateError(f"a width in a format may be at most {MAX_WIDTH}")
    if takes_widths:
        _check_widths(values)


def _check_method(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    text, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if not isinstance(text, str):
        return
    values = [*args, *kwargs.values()]
    if name in _WIDTH_METHODS:
        _check_widths(values)
        if name == "expandtabs":
            check_chars(len(text) + text.count("\t") * max([8, *(v for v in values if isinstance(v, int))]))
    elif name == "replace":
        _check_replace(text, values)
    elif name == "join":
        _check_join(values[0] if values else (), text)
    elif name == "translate" and values and isinstance(values[0], Mapping):
        longest = max((len(value) for value in values[0].values() if isinstance(value, str)), default=1)
        check_chars(len(text) * longest)
    elif name in ("format", "format_map"):
        _check_format(text, values, "{" in text.replace("{{", "").partition(":")[2])


def _check_replace(text: str, values: list[Any]) -> None:
    if len(values) >= 2 and all(isinstance(value, str) for value in values[:2]):
        check_chars(len(text) + text.count(values[0]) * len(values[1]))


def _check_join(items: Any, separator: str) -> None:
    if isinstance(items, (list, tuple)):
        check_chars(sum(len(str(item)) for item in items) + len(separator) * len(items))


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    check = _FILTERS[name]

    def limited(*args: Any, **kwargs: Any) -> Any:
        # Jinja gives some filters its environment or context before the value
        first = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0
        check(args[first], [*args[first + 1 :], *kwargs.values()])
        return function(*args, **kwargs)

    limited.__dict__.update(getattr(function, "__dict__", {}))
    return limited


def _check_width(value: Any, values: list[Any]) -> None:
    _check_widths(values)


def _check_indent(value: Any, values: list[Any]) -> None:
    _check_widths(values)
    width = max([4, *(v if isinstance(v, int) else len(v) for v in values if isinstance(v, (int, str)))])
    check_chars(len(str(value)) + (str(value).count("\n") + 1) * width)


def _check_wrap(value: Any, values: list[Any]) -> None:
    _check_widths(values)
    if len(str(value)) > MAX_WRAPPED_CHARS:
        raise TemplateError(
            f"a text that is broken into lines may have at most {MAX_WRAPPED_CHARS} characters, got {len(str(value))}"
        )
    check_chars(len(str(value)) * max([1, *(len(v) for v in values if isinstance(v, str))]))


def _check_formatted(value: Any, values: list[Any]) -> None:
    _check_format(str(value), values, "*" in str(value))


_FILTERS: dict[str, Callable[[Any, list[Any]], None]] = {
    **dict.fromkeys(_WIDTH_FILTERS, _check_width),
    "indent": _check_indent,
    "wordwrap": _check_wrap,
    "format": _check_formatted,
    "replace": lambda value, values: _check_replace(str(value), values),
    "join": lambda value, values: _check_join(value, str(values[0]) if values else ""),
}
