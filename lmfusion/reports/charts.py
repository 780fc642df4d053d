"""Line charts as SVG and PNG, with matplotlib. The same data give the same bytes."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmfusion.utils.packages import require

LEGEND_LINE = 0.25
"""Height of a line of the legend, in inches."""
_TITLE = 0.3
"""Height of the title, in inches."""
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters stay text: readers can search them, and the file is small
    "svg.hashsalt": "lmfusion",  # ids of SVG elements are random without it
    "font.size": 9.5,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}


@dataclass(frozen=True)
class Line:
    """A curve."""

    label: str
    """In the legend; panels have the same lines in the same order."""
    x: Sequence[float]
    y: Sequence[float]
    style: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of matplotlib's Axes.plot: color, marker, linestyle, ..."""


@dataclass(frozen=True)
class Panel:
    """A pair of axes with its lines."""

    title: str
    lines: Sequence[Line]
    x_label: str = "steps"


def check_matplotlib(user: str) -> None:
    """Raise ValueError if matplotlib is missing. user: what needs it, for the message."""
    require("matplotlib", user, "matplotlib")


def line_charts(
    panels: Sequence[Panel],
    formats: Sequence[str] = ("svg",),
    *,
    title: str = "",
    num_columns: int = 1,
    panel_size: tuple[float, float] = (4.8, 3.3),
    legend_columns: int = 0,
) -> list[bytes]:
    """The picture of all panels in each of `formats`, "svg" or "png".

    panel_size: width and height in inches. legend_columns: 0 leaves the legend out.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_rows = max(1, -(-len(panels) // num_columns))
    lines = panels[0].lines if panels and legend_columns else []
    legend_height = LEGEND_LINE * -(-len(lines) // legend_columns) + 0.1 if lines else 0.0
    title_height = _TITLE if title else 0.0
    height = num_rows * panel_size[1] + legend_height + title_height
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(num_columns * panel_size[0], height), facecolor="white")
        FigureCanvasAgg(figure)
        if title:
            figure.suptitle(title, y=1 - 0.12 / height, va="top", fontsize=11.5)
        for i, panel in enumerate(panels):
            axes = figure.add_subplot(num_rows, num_columns, i + 1)
            for line in panel.lines:
                axes.plot(line.x, line.y, label=line.label, **line.style)
            axes.set_title(panel.title, fontsize=9.5)
            axes.set_xlabel(panel.x_label)
            axes.set_xlim(left=0)
            axes.margins(x=0.03)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        if lines:
            # Labels are given again because matplotlib would leave out those that begin with an underscore
            labels = [line.label for line in lines]
            figure.legend(figure.axes[0].lines, labels, loc="lower center", ncol=legend_columns, frameon=False)
        figure.tight_layout(rect=(0, legend_height / height, 1, 1 - title_height / height))
        return [_save(figure, file_format) for file_format in formats]


def _save(figure: Any, file_format: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None} if file_format == "svg" else None
    figure.savefig(buffer, format=file_format, dpi=110, metadata=metadata)
    return buffer.getvalue()
