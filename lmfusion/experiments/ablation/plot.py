"""How do the variants compare at a glance? One panel a metric, its curves over the steps, one colour a variant."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmfusion.utils.packages import require

TITLES = {
    "diffusion_loss": "Diffusion loss, held-out images\n(squared error; lower is better)",
    "caption_loss": "Caption loss, held-out images\n(nats a token; lower is better)",
    "text_loss": "Loss of plain text\n(nats a token; lower is better)",
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
"""Okabe and Ito's, which colour-blind readers can tell apart, and three more."""
MARKERS = "osD^vP*Xdh"
DASHES = ("-", (0, (6, 6)), (0, (2, 4)))
"""Where curves are the same, as those of frozen text, the ones below show in the gaps."""
WIDTH, PANEL_HEIGHT, LEGEND_LINE = 9.6, 3.3, 0.25
"""In inches."""


def check_plot() -> None:
    """Raise ValueError where matplotlib is missing."""
    require("matplotlib", "the plot of an ablation", "matplotlib")


def draw_plot(curves: Mapping[str, Sequence[Mapping[str, Any]]], title: str, folder: Path) -> list[Path]:
    """Write ablation.svg and ablation.png into `folder`; answer with their paths.

    curves: of each variant the lines of `read_curve`. A panel is left out where no variant has its metric.
    """
    check_plot()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [metric for metric in TITLES if any(_points(curve, metric) for curve in curves.values())]
    num_rows = max(1, -(-len(shown) // 2))
    num_columns = min(4, len(curves))
    legend_height = LEGEND_LINE * -(-len(curves) // num_columns) + 0.1
    height = num_rows * PANEL_HEIGHT + legend_height + 0.3
    # Letters as text: readers can search them, and the file is small
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "ablation", "font.size": 9.5}):
        figure = Figure(figsize=(WIDTH, height), facecolor="white")
        FigureCanvasAgg(figure)
        figure.suptitle(title, y=1 - 0.12 / height, va="top", fontsize=11.5)
        for i, metric in enumerate(shown):
            axes = figure.add_subplot(num_rows, 2, i + 1)
            for number, (name, curve) in enumerate(curves.items()):
                points = _points(curve, metric)
                axes.plot(
                    [step for step, _ in points],
                    [value for _, value in points],
                    color=COLOURS[number % len(COLOURS)],
                    marker=MARKERS[number % len(MARKERS)],
                    linestyle=DASHES[number % len(DASHES)],
                    markersize=max(4.0, 8.0 - 0.6 * number),
                    linewidth=1.6,
                    label=name,
                )
            axes.set_title(TITLES[metric], fontsize=9.5)
            axes.set_xlabel("steps")
            axes.set_xlim(left=0)
            axes.margins(x=0.03)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        if shown:
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="lower center", ncol=num_columns, frameon=False)
        figure.tight_layout(rect=(0, legend_height / height, 1, 1 - 0.3 / height))
        paths = [folder / f"ablation.{suffix}" for suffix in ("svg", "png")]
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else None  # the same picture, the same bytes
            figure.savefig(path, dpi=110, metadata=metadata)
    return paths


def _points(curve: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[int, float]]:
    return [(line["step"], line[metric]) for line in curve if line.get(metric) is not None]
