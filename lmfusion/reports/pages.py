"""Renders reports from the templates beside this file. HTML templates escape every value that they show.

A template extends base.html (layout and style sheet) and shows data with the macros of macros.html: `table` and
`picture_grid`. Markdown reports use macros.md.
"""

import base64
import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image


@dataclass(frozen=True)
class ReportImage:
    """An image of a page."""

    source: str
    """Address: a path relative to the page, or a data URI."""
    title: str
    """What it shows, for the tooltip and for screen readers."""
    caption: str = ""
    verdict: str = ""
    """Colour of the caption: "right", "wrong" or none."""
    note: str = ""
    """A second line below the caption."""
    size: str = ""
    """How it is shown: "small" (enlarged, each pixel as a square), "large" (on a line of its own), or as it is."""


class Cell(NamedTuple):
    """A table cell with a CSS class, such as "number" (aligned right) or "details" (small print)."""

    text: str
    kind: str


def render_template(name: str, **values: Any) -> str:
    """The text of a report.

    name: a file in templates/. values: the variables of the template; a missing one is an error.
    """
    return _environment().get_template(name).render(**values)


def embedded(image: Image.Image, title: str, **fields: Any) -> ReportImage:
    """An image that the page carries as a PNG. fields: further fields of `ReportImage`."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return ReportImage(data_uri("image/png", buffer.getvalue()), title, **fields)


def data_uri(media_type: str, content: bytes) -> str:
    """`content` as an address that needs no file."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def as_cell(value: Any) -> tuple[str, Any]:
    """(CSS class, content) of a table cell.

    Numbers are aligned right, floats with four significant digits. A list holds images and, as None, missing ones.
    """
    if isinstance(value, Cell):
        return value.kind, value.text
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "images", value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number", f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
    return "", str(value)


def markdown_cell(value: Any) -> str:
    """The text of a cell of a Markdown table: one line, in which bars do not end the cell."""
    return " ".join(str(value).split("\n")).replace("|", "\\|")


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lmfusion.reports"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"as_cell": as_cell, "markdown_cell": markdown_cell}
    return environment
