"""The plot of an ablation: one panel per metric, with its curves over the steps in one colour per variant."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmfusion.reports.charts import Line, Panel, check_matplotlib, line_charts
from lmfusion.utils.files import atomic_write

TITLES = {
    "diffusion_loss": "Diffusion loss, held-out images\n(squared error; lower is better)",
    "caption_loss": "Caption loss, held-out images\n(nats per token; lower is better)",
    "text_loss": "Loss of plain text\n(nats per token; lower is better)",
    "text_accuracy": "Multiple-choice task\n(share right; higher is better)",
}
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
    "#999999",
    "#7a4a00",
    "#8a2be2",
)
"""The palette of Okabe and Ito, which colour-blind readers can tell apart, and three more."""
MARKERS = "osD^vP*Xdh"
DASHES = ("-", (0, (6, 6)), (0, (2, 4)))
"""Several variants with frozen text have the same curve: the lower ones show through the gaps of the upper ones."""
FORMATS = ("svg", "png")


def check_plot() -> None:
    """Raise ValueError if matplotlib is missing."""
    check_matplotlib("the plot of an ablation")


def draw_plot(curves: Mapping[str, Sequence[Mapping[str, Any]]], title: str, folder: Path) -> list[Path]:
    """Write ablation.svg and ablation.png into `folder`, and return their paths.

    curves: the lines of `read_curve` for each variant. A panel is left out if no variant has its metric.
    """
    check_plot()
    shown = [metric for metric in TITLES if any(_points(curve, metric) for curve in curves.values())]
    panels = [
        Panel(
            TITLES[metric], [_line(i, name, _points(curve, metric)) for i, (name, curve) in enumerate(curves.items())]
        )
        for metric in shown
    ]
    pictures = line_charts(panels, FORMATS, title=title, num_columns=2, legend_columns=min(4, len(curves)))
    paths = [folder / f"ablation.{file_format}" for file_format in FORMATS]
    for path, content in zip(paths, pictures, strict=True):
        with atomic_write(path) as file:
            file.write(content)
    return paths


def _line(number: int, name: str, points: Sequence[tuple[int, float]]) -> Line:
    style = {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number % len(DASHES)],
        "markersize": max(4.0, 8.0 - 0.6 * number),
        "linewidth": 1.6,
    }
    return Line(name, [step for step, _ in points], [value for _, value in points], style)


def _points(curve: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[int, float]]:
    return [(line["step"], line[metric]) for line in curve if line.get(metric) is not None]
