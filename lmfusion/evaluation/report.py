"""The HTML page of an evaluation: scores with intervals, tables, images, and how to repeat it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from lmfusion.evaluation.results import SampleImage, Score, SuiteResult
from lmfusion.reports.pages import Cell, ReportImage, render_template

SMALL, LARGE = 64, 256
"""Pixels on a side: images up to the first are enlarged; those above the second get a line of their own."""


def render_report(values: Mapping[str, Any], results: Sequence[SuiteResult], folder: Path) -> str:
    """The page for the content of eval.json. Its images are files below `folder`, in a subfolder per suite."""
    return render_template(
        "evaluation.html",
        model=values["model"]["path"],
        command=values["command"],
        suites=[_suite(result, folder / result.suite) for result in results],
        about=[(name, Cell(text, "details")) for name, text in _about(values)],
    )


def _about(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was evaluated, where and when, for a table."""
    model, base = values["model"], values["model"]["base"]
    about = [
        ("model", model["path"]),
        ("sha256 of its weights and configuration", model["sha256"]),
        ("base LLM", "none" if base is None else f"{base['name']} ({base['dtype']}, sha256 {base['sha256']})"),
        ("parameters", f"{model['text_parameters']:,} text, {model['image_parameters']:,} image; {model['dtype']}"),
        ("lmfusion", f"{values['lmfusion']}, commit {values['commit'] or 'unknown'}"),
        ("sha256 of the settings", values["config_sha256"]),
        ("device", values["device"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in values["versions"].items())),
        ("date", values["date"]),
    ]
    for name, suite in values["suites"].items():
        made = suite["made"]
        about.append((name, f"{suite['seconds']:.0f} s on {made['device']}, {made['date']}, commit {made['commit']}"))
    return about


def _suite(result: SuiteResult, folder: Path) -> dict[str, Any]:
    """A suite as the template shows it."""
    shared = shared_details(result.scores)
    return {
        "title": result.suite.capitalize(),
        "scores": [_score_row(score, shared) for score in result.scores],
        "shared_details": _details(shared),
        "tables": result.tables,
        "images": [_image(folder, picture) for picture in result.pictures],
        "settings": [(name, Cell(str(value), "details")) for name, value in result.settings.items()],
    }


def shared_details(scores: Sequence[Score]) -> dict[str, Any]:
    """Details that more than half of the scores have, all with the same value. The page shows them once."""
    found: dict[str, list[Any]] = {}
    for score in scores:
        for name, value in score.details.items():
            found.setdefault(name, []).append(value)
    return {
        name: values[0]
        for name, values in found.items()
        if len(values) > max(1, len(scores) / 2) and all(value == values[0] for value in values)
    }


def _score_row(score: Score, shared: Mapping[str, Any]) -> tuple[Any, ...]:
    interval = "" if score.low is None or score.high is None else f"[{score.low:.4g}, {score.high:.4g}]"
    own = {name: value for name, value in score.details.items() if name not in shared}
    value = Cell(f"{score.value:.4g}", "number")
    return score.name, value, Cell(interval, "number"), score.count, Cell(_details(own), "details")


def _details(details: Mapping[str, Any]) -> str:
    return "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in details.items())


def _image(folder: Path, picture: SampleImage) -> ReportImage:
    with Image.open(folder / picture.file) as image:
        side = max(image.size)
    size = "small" if side <= SMALL else "large" if side > LARGE else ""
    return ReportImage(quote(f"{folder.name}/{picture.file}"), picture.caption, picture.caption, size=size)
