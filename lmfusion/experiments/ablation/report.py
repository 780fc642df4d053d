"""What is to be said of an ablation? Its table and its findings in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from lmfusion.experiments.ablation.claims import Finding
from lmfusion.experiments.ablation.config import METRICS

COLUMNS = {
    "diffusion_loss": "diffusion loss",
    "caption_loss": "caption loss",
    "text_loss": "text loss",
    "text_accuracy": "accuracy",
    "drawings_right": "drawings right",
}
ANSWERS = {True: "found", False: "NOT found", None: "not measured"}


def markdown(title: str, variants: Mapping[str, Mapping[str, Any]], findings: Sequence[Finding]) -> str:
    """The report: a table with a row a variant and, where there are claims, one with a row a claim.

    variants: as ablation.json has them.
    """
    shown = [metric for metric in METRICS if any(v["final"].get(metric) is not None for v in variants.values())]
    head = ["variant", "trained parameters", *(COLUMNS[metric] for metric in shown), "steps", "tokens", "seconds"]
    rows = []
    for name, variant in variants.items():
        final = variant["final"]
        row = [name, f"{variant['trained_parameters'] / 1e6:.2f} M", *(_value(metric, final) for metric in shown)]
        rows.append([*row, str(final["step"]), f"{final['tokens']:,}", f"{final['seconds']:.0f}"])
    starts = [(name, variant["start"]) for name, variant in variants.items()]
    parts = [f"# {title}", table(head, rows), *_start_lines(starts)]
    if findings:
        rows = [
            [finding.claim, COLUMNS[finding.metric], finding.expected, ANSWERS[finding.found], _numbers(finding)]
            for finding in findings
        ]
        parts += ["## Claims", table(["claim", "metric", "expected", "", "values"], rows)]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown. Bars in its texts are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _start_lines(starts: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """What text was like before the first step: in one line where it was the same for all."""
    said = {
        name: ", ".join(f"{COLUMNS[m]} {_value(m, start)}" for m in METRICS if m in start) for name, start in starts
    }
    if len(set(said.values())) == 1:
        return [f"Before the first step, all variants: {next(iter(said.values()))}."]
    return ["Before the first step: " + "; ".join(f"{name}: {text}" for name, text in said.items()) + "."]


def _value(metric: str, values: Mapping[str, Any]) -> str:
    value = values.get(metric)
    if value is None:
        return "–"
    if metric not in ("text_accuracy", "drawings_right"):
        return f"{value:.4f}"
    low, high = values.get(f"{metric}_low"), values.get(f"{metric}_high")
    return f"{value:.3f}" + ("" if low is None else f" ({low:.3f} to {high:.3f})")


def _numbers(finding: Finding) -> str:
    digits = 17 if finding.is_exact else 5
    numbers = (
        f"{name} {'–' if value is None else format(value, f'.{digits}g')}" for name, value in finding.values.items()
    )
    return "; ".join(numbers)
