"""Draws the bar charts of results pages as SVG, without a plotting package, so that the bytes never vary."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

OURS, THEIRS, FLOOR = "#1f6f54", "#9aa5b1", "#d9c48f"
LABEL_WIDTH, BAR_WIDTH, LINE_HEIGHT, GROUP_GAP = 300, 420, 15, 12
LONGEST = 4.0


@dataclass(frozen=True)
class Bar:
    """One contestant of a row, with its time relative to ours."""

    label: str
    value: float
    is_ours: bool = False
    is_floor: bool = False


@dataclass(frozen=True)
class Group:
    """The bars of one row."""

    title: str
    bars: Sequence[Bar]


def svg(title: str, groups: Sequence[Group]) -> str:
    """Bars with the lengths of times relative to ours; the dashed line is ours. Bars are cut at LONGEST."""
    longest = min(LONGEST, max(bar.value for group in groups for bar in group.bars))

    parts: list[str] = []
    y = 40.0
    for group in groups:
        parts.append(_text(8, y + 11, group.title, "start", "font-weight='bold'"))
        y += LINE_HEIGHT
        for bar in group.bars:
            color = OURS if bar.is_ours else FLOOR if bar.is_floor else THEIRS
            width = BAR_WIDTH * min(bar.value, longest) / longest
            box = f"x='{LABEL_WIDTH}' y='{y + 2:.1f}' width='{width:.1f}' height='{LINE_HEIGHT - 4}'"
            parts.append(f"<rect {box} fill='{color}'/>")
            parts.append(_text(LABEL_WIDTH - 8, y + 11, bar.label, "end"))
            parts.append(
                _text(
                    LABEL_WIDTH + width + 4,
                    y + 11,
                    f"{bar.value:.2f}{' (cut)' if bar.value > longest else ''}",
                    "start",
                )
            )
            y += LINE_HEIGHT
        y += GROUP_GAP
    height = y + 6
    x = LABEL_WIDTH + BAR_WIDTH / longest
    ends = f"x1='{x:.1f}' x2='{x:.1f}' y1='34' y2='{height - 10:.1f}'"
    line = f"<line {ends} stroke='{OURS}' stroke-dasharray='3 3'/>"
    width = LABEL_WIDTH + BAR_WIDTH + 60
    heading = _text(8, 18, f"{title}: time over ours", "start", "font-size='13'")
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height:.0f}' font-family='sans-serif' "
        f"font-size='11'>\n<rect width='100%' height='100%' fill='white'/>\n"
        + "\n".join([heading, line, *parts])
        + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, anchor: str, extra: str = "") -> str:
    text = text if len(text) <= 60 else text[:59] + "…"
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {extra}>{html.escape(text)}</text>"
