"""The report of an ablation in Markdown: a table of the variants, and what was found of each claim."""

from collections.abc import Mapping, Sequence
from typing import Any

from lmfusion.experiments.ablation.claims import Finding
from lmfusion.experiments.ablation.config import METRICS
from lmfusion.reports.pages import render_template

COLUMNS = {
    "diffusion_loss": "diffusion loss",
    "caption_loss": "caption loss",
    "text_loss": "text loss",
    "text_accuracy": "accuracy",
    "image_accuracy": "image accuracy",
}
ANSWERS = {True: "found", False: "NOT found", None: "not measured"}


def markdown(title: str, variants: Mapping[str, Mapping[str, Any]], findings: Sequence[Finding]) -> str:
    """The report: a table with one row per variant and, if there are claims, one with a row per claim.

    variants: as ablation.json has them.
    """
    shown = [metric for metric in METRICS if any(v["final"].get(metric) is not None for v in variants.values())]
    header = ["variant", "trained parameters", *(COLUMNS[metric] for metric in shown), "steps", "tokens", "seconds"]
    rows = []
    for name, variant in variants.items():
        final = variant["final"]
        row = [name, f"{variant['trained_parameters'] / 1e6:.2f} M", *(_value(metric, final) for metric in shown)]
        rows.append([*row, str(final["step"]), f"{final['tokens']:,}", f"{final['seconds']:.0f}"])
    claims = [
        (finding.claim, COLUMNS[finding.metric], finding.expected, ANSWERS[finding.found], _numbers(finding))
        for finding in findings
    ]
    start = _start_line({name: variant["start"] for name, variant in variants.items()})
    return render_template("ablation.md", title=title, header=header, rows=rows, start=start, claims=claims)


def _start_line(starts: Mapping[str, Mapping[str, Any]]) -> str:
    """The metrics of text before the first step, given once if all variants have the same."""
    texts = {
        name: ", ".join(f"{COLUMNS[m]} {_value(m, start)}" for m in METRICS if m in start)
        for name, start in starts.items()
    }
    if len(set(texts.values())) == 1:
        return f"Before the first step, all variants: {next(iter(texts.values()))}."
    return "Before the first step: " + "; ".join(f"{name}: {text}" for name, text in texts.items()) + "."


def _value(metric: str, values: Mapping[str, Any]) -> str:
    value = values.get(metric)
    if value is None:
        return "–"
    if metric not in ("text_accuracy", "image_accuracy"):
        return f"{value:.4f}"
    low, high = values.get(f"{metric}_low"), values.get(f"{metric}_high")
    return f"{value:.3f}" + ("" if low is None else f" ({low:.3f} to {high:.3f})")


def _numbers(finding: Finding) -> str:
    digits = 17 if finding.is_exact else 5
    numbers = (
        f"{name} {'–' if value is None else format(value, f'.{digits}g')}" for name, value in finding.values.items()
    )
    return "; ".join(numbers)
