"""Writes all rows of benchmark results as Markdown tables with plots.

The tables hold everything that the results hold: a contestant that failed is a line with the reason, and every baseline
that was faster is listed under "Where we lose".
"""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.harness.chart import Bar, Group, svg
from benchmarks.harness.output import file_name, launches_of, speed_of, verdict

PREFIX = "performance-"
"""Of the file names of plots."""

Results = dict[str, Any]

TITLES = {
    "routed_block": "Two-tower layer",
    "training_step": "Training step",
    "peers": "Layers of BAGEL and NeMo Automodel",
    "denoise_step": "Denoising step, one layer",
    "decode": "Decoding step, one layer",
    "generation_step": "Generation step, whole model",
    "generation": "Generation, whole model",
    "hybrid_attention": "Attention under the hybrid mask",
    "hidden_spans": "Attention with hidden spans",
    "routed_linear": "Routed projections",
    "routed_swiglu": "Routed feed-forward network",
    "rms_norm": "Routed RMSNorm",
    "rope_reorder": "RoPE and reordering",
    "swiglu": "SwiGLU",
    "reorder_rows": "Reordering of rows",
}
INTRODUCTION = """\
# Benchmark results

Written by `python -m benchmarks.harness.report`; edits here are lost. benchmarks/README.md says what a row means and
how the comparison is kept fair.

A ratio is our median time over the baseline's, measured in turns in one run: below 1 we are faster. Rates count useful
work: the visible area of the mask, the GEMMs that the requested gradients need, the bytes that have to move. "Of
ceiling" is the share of what a large matmul of random numbers (for TFLOP/s) or a large copy (for GB/s) reached in the
same run.
"""
NO_GPU = """
**No result of a GPU is committed. The CUDA and Triton kernels are untested on a GPU, and no figure on this page is one
of a GPU.** `make gpu OUTPUT=folder` measures one.
"""


def tables_page(all_results: Sequence[Results], images: str) -> tuple[str, dict[str, str]]:
    """The page with all rows, and its plots by file name. images: path from the page to the plots' folder, with a
    slash."""
    parts = [INTRODUCTION]
    plots: dict[str, str] = {}
    if not has_gpu(all_results):
        parts.append(NO_GPU)
    for results in all_results:
        text, drawn = section(results, images)
        parts.append(text)
        plots |= drawn
    return "\n".join(parts), plots


def has_gpu(all_results: Sequence[Results]) -> bool:
    return any(results["device"]["type"] == "cuda" for results in all_results)


def section(results: Results, images: str) -> tuple[str, dict[str, str]]:
    """The results of one device."""
    device, ceilings = results["device"], results["ceilings"]
    matmul = ", ".join(f"{rate:.3g} TFLOP/s {dtype}" for dtype, rate in ceilings["matmul_tflop_s"].items())
    facts = {
        "device": ", ".join(f"{k} {v}" if k not in ("name", "type") else str(v) for k, v in device.items()),
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        "commit, date": f"{results['commit']}, {results['date']}; {results['wall_s']:.0f} s for all rows",
        "ceilings": f"copy {ceilings['copy_gb_s']:.4g} GB/s, matmul {matmul}",
    }
    lines = [f"## {device['name']}", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    rows = [row for row in results["rows"] if row["contestants"]]
    lines += ["", *bars_section(rows), *_losses(rows)]
    plots = {}
    for op, title in {**TITLES, **{row["op"]: row["op"] for row in rows if row["op"] not in TITLES}}.items():
        of_op = [row for row in rows if row["op"] == op]
        if of_op:
            lines += [f"### {title}", ""]
            if groups := _groups(of_op):
                name = plot_name(results, op)
                plots[name] = svg(title, groups)
                lines += [f"![{title}: bars of all contestants]({images}{name})", ""]
            lines += [*_ratios(of_op), *_details(of_op)]
    lines += _unmeasured(results["rows"])
    return "\n".join(lines), plots


def plot_name(results: Results, op: str) -> str:
    """The file name of a device's plot of an op."""
    return f"{PREFIX}{file_name(results).rsplit('-', 3)[0]}-{op.replace('_', '-')}.svg"


def measured(row: Results) -> dict[str, Results]:
    return {name: line for name, line in row["contestants"].items() if line["status"] == "measured"}


def baselines(row: Results) -> dict[str, Results]:
    """Measured contestants that compute the same work and are not variants of ours."""
    return {n: line for n, line in measured(row).items() if not n.startswith("ours") and not line.get("is_floor")}


def label(row: Results) -> str:
    case = f"{row['case']}, " if row["case"] else ""
    return f"{row['shape']}, {case}{row['tokens']:,} tokens"


def title_of(row: Results) -> str:
    return TITLES.get(row["op"], str(row["op"])) + ": " + label(row)


def kind(row: Results) -> str:
    return f"{row['dtype'].replace('float', 'fp').replace('bfp', 'bf')} {row['direction']}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "| " + " | ".join(["---"] + ["---:"] * (len(header) - 1)) + " |",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def promises(rows: Sequence[Results]) -> list[tuple[str, ...]]:
    """(row, kind, what is promised, measured value, bar and whether it is met) of every bar."""
    found = []
    for row in rows:
        where = title_of(row), kind(row)
        for name, line in measured(row).items():
            if line.get("least"):
                value = ", ".join(f"{line.get(key, 0.0):.3g}" for key in line["least"])
                found.append((*where, f"{name}: {', '.join(line['least'])}", value, verdict(line)))
            elif line.get("bar") is not None and "ratio" in line:
                found.append((*where, f"ours / {name}", f"{line['ratio']:.2f}", verdict(line)))
    return found


def bars_section(rows: Sequence[Results]) -> list[str]:
    """How many bars are met, and a table of the others."""
    promised = promises(rows)
    if not promised:
        return []
    missed = [line for line in promised if not line[-1].endswith("met")]
    counts = f"{len(promised) - len(missed)} of {len(promised)} bars are met."
    text = f"{counts} A bar is a ratio that we promise to stay below, or a rate that we promise to reach."
    if not missed:
        return ["### Bars", "", text, ""]
    return ["### Bars", "", f"{text} Missed:", "", *markdown_table(["row", "", "value", "measured", "bar"], missed)]


def _losses(rows: Sequence[Results]) -> list[str]:
    lost = []
    for row in rows:
        ours = row["contestants"][row["ours"]]
        for name, line in baselines(row).items():
            if line.get("ratio", 0) > 1:
                spread = max(ours["iqr_ms"], line["iqr_ms"])
                noise = "within the spread" if ours["median_ms"] - line["median_ms"] < spread else ""
                times = f"{ours['median_ms']:.3g}", f"{line['median_ms']:.3g}"
                lost.append((line["ratio"], (title_of(row), kind(row), name, *times, f"{line['ratio']:.2f}", noise)))
    lines = ["### Where we lose", ""]
    if not lost:
        return [*lines, "No baseline of the same work was faster in any row.", ""]
    header = ["row", "", "faster baseline", "ours, ms", "baseline, ms", "ratio", ""]
    return [*lines, *markdown_table(header, [line for _, line in sorted(lost, key=lambda item: -item[0])])]


def _ratios(rows: Sequence[Results]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row["contestants"] if name != row["ours"]))
    header = ["", "", "ours, ms", "rate", "of ceiling", *(f"ours / {name.removeprefix('ours, ')}" for name in names)]
    body = []
    for row in rows:
        ours = row["contestants"][row["ours"]]
        cells = [label(row), kind(row)]
        if ours["status"] == "measured":
            share = f"{100 * ours['share_of_ceiling']:.0f} %" if "share_of_ceiling" in ours else ""
            cells += [f"{ours['median_ms']:.3g} ± {ours['iqr_ms'] / 2:.2g}", speed_of(ours), share]
        else:
            cells += [ours["status"], "", ""]
        for name in names:
            line = row["contestants"].get(name, {})
            cells.append(f"{line['ratio']:.2f}" if "ratio" in line else line.get("status", "").replace("measured", ""))
        body.append(cells)
    return markdown_table(header, body)


def _details(rows: Sequence[Results]) -> list[str]:
    header = ["", "ms", "IQR", "rate", "launches", "peak MiB", "mask, ms", "first call, s"]
    body = []
    for row in rows:
        body.append([f"**{label(row)}, {kind(row)}**"] + [""] * 7)
        for name, line in row["contestants"].items():
            if line["status"] != "measured":
                body.append([f"{name}: {line['status']}, {_cell(line['reason'])}"] + [""] * 7)
                continue
            numbers = [f"{line['median_ms']:.4g}", f"{line['iqr_ms']:.2g}", speed_of(line), launches_of(line)]
            rest = [f"{line[key]:.3g}" if key in line else "" for key in ("peak_mib", "mask_ms", "first_call_s")]
            body.append([name, *numbers, *rest])
    note = (
        "Launches: kernels on a GPU, dispatched ops on a CPU. The first call compiles. A mask is built once per batch."
    )
    return ["<details><summary>all lines</summary>", "", note, "", *markdown_table(header, body), "</details>", ""]


def _cell(text: str) -> str:
    return text.replace("|", "/")[:160]


def _unmeasured(rows: Sequence[Results]) -> list[str]:
    """The rows in which we have no time."""
    missing = [row for row in rows if row["status"] != "measured"]
    if not missing:
        return []
    return ["### Not measured", "", *(f"- `{r['name']}` {r['status']}: {_cell(r['reason'])}" for r in missing), ""]


def _groups(rows: Sequence[Results]) -> list[Group]:
    """The rows of the last dtype (bfloat16 if there is more than one), at most as many as fit into a picture."""
    shown = [row for row in rows if row["dtype"] == rows[-1]["dtype"]][:14]
    groups = []
    for row in shown:
        lines = measured(row)
        if row["ours"] not in lines:
            continue
        ours = lines[row["ours"]]["median_ms"]
        bars = [
            Bar(name, line["median_ms"] / ours, name.startswith("ours"), line.get("is_floor", False))
            for name, line in lines.items()
        ]
        groups.append(Group(f"{row['case'] or row['shape']}, {kind(row)}", bars))
    return groups
