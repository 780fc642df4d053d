"""Writes the report of a run of benchmarks/gpu.py, beside its results.json.

    python -m benchmarks.harness.gpu_report runs/gpu/results.json

results.md: the tests' results and the tables of the benchmarks. plots.svg: all plots of these in one picture. After a
run on a GPU also attention_table.json, a proposal for lmfusion_kernels/attention/table.json: review it, then copy it
there. lmfusion_kernels/attention/propose.py decides; this file only translates the benchmarks' results.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import shapes
from benchmarks.harness.output import read_results
from benchmarks.harness.tables import tables_page
from lmfusion_kernels.attention import propose, table
from lmfusion_kernels.attention.dispatch import KERNELS

HEAD_DIMS = {shape.name: shape.head_dim for shape in vars(shapes).values() if isinstance(shape, shapes.LayerShape)}


def attention_times(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The input of `propose`: a kernel's median for each pattern, separately for forward and backward.

    The benchmarks time the forward alone and both together, so the backward is the difference.
    """
    medians: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in results["rows"]:
        if row["op"] == "hybrid_attention" and row["contestants"]:
            kind = (row["case"], row["dtype"], row["shape"], row["tokens"])
            for name, line in row["contestants"].items():
                if name in KERNELS and line["status"] == "measured":
                    medians.setdefault((*kind, name), {})[row["direction"]] = line["median_ms"]
    for (case, dtype, shape, tokens, name), by_direction in medians.items():
        common = {
            "capability": results["device"]["capability"], "dtype": dtype, "head_dim": HEAD_DIMS[shape],
            "num_tokens": tokens, "pattern": case, "kernel": name,
        }  # fmt: skip
        if "forward" not in by_direction:
            continue
        yield {**common, "direction": "forward", "median_ms": by_direction["forward"]}
        if "forward+backward" in by_direction:
            backward = by_direction["forward+backward"] - by_direction["forward"]
            yield {**common, "direction": "backward", "median_ms": max(backward, 0.0)}


def stacked(plots: Mapping[str, str]) -> str:
    """All plots in one SVG, one below the other."""
    width = height = 0
    parts = []
    for plot in plots.values():
        size = {name: int(value) for name, value in re.findall(r"\b(width|height)='(\d+)'", plot.split(">")[0])}
        parts.append(plot.replace("<svg ", f"<svg y='{height}' ", 1))
        width, height = max(width, size["width"]), height + size["height"] + 10
    head = f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}'>"
    return "\n".join([head, "<rect width='100%' height='100%' fill='white'/>", *parts, "</svg>", ""])


def tests_section(commands: list[dict[str, Any]]) -> str:
    """The tests' counts, failures, and reasons of skips."""
    lines = [
        "# Tests",
        "",
        "| | | passed | failed | skipped | s | |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for command in commands:
        counts = command.get("tests", {})
        cells = [command["name"], command["status"]]
        cells += [str(counts.get(name, "")) for name in ("passed", "failed", "skipped")]
        cells += [str(command.get("seconds", "")), command.get("detail", "")]
        lines.append(f"| {' | '.join(cells)} |")
    failures = [failure for command in commands for failure in command.get("failures", [])]
    skips = [f"{count} skipped: {why}" for command in commands for why, count in command.get("skips", {}).items()]
    for name, items in (("Failed", failures), ("Skipped", skips)):
        if items:
            lines += ["", f"{name}:", "", *(f"- {item}" for item in items)]
    return "\n".join([*lines, "", ""])


def main(path: str) -> None:
    results = read_results(Path(path))
    folder = Path(path).parent
    text, plots = tables_page([results], "")
    if plots:
        text = re.sub(r"!\[[^\]]*\]\([^)]*\.svg\)\n\n?", "", text) + "\n## Plots\n\n![Bars of all rows](plots.svg)\n"
        (folder / "plots.svg").write_text(stacked(plots))
    tests = tests_section(results["tests"]) if results.get("tests") else ""
    (folder / "results.md").write_text(tests + text)
    if results["device"]["type"] == "cuda":
        rows = propose.propose(attention_times(results))
        (folder / "attention_table.json").write_text(propose.merge(table.load(), rows))


if __name__ == "__main__":
    main(sys.argv[1])
