"""How do results become pages?

    python -m benchmarks.harness.report                          docs/performance.md from benchmarks/results/*.json
    python -m benchmarks.harness.report --keep runs/x/results.json    take a run into benchmarks/results first, for its device
    python -m benchmarks.harness.report runs/x/results.json      results.md and plots beside that file

The page holds what the results hold: a device that was never measured has no section, a baseline that was faster is
listed under "Where we lose".
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.chart import Bar, Group, svg
from benchmarks.harness.output import file_name, launches_of, read_results, speed_of, verdict

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"
PREFIX = "performance-"

Results = dict[str, Any]

TITLES = {
    "routed_block": "Two-tower layer",
    "training_step": "Training step",
    "peers": "Beside BAGEL's and NeMo Automodel's layers",
    "denoise_step": "Denoising step, one layer",
    "decode": "Decoding step, one layer",
    "generation_step": "A step of generation, whole model",
    "generation": "Generation, whole model",
    "hybrid_attention": "Attention under the hybrid mask",
    "hidden_spans": "Attention where spans are hidden",
    "routed_linear": "Routed projections",
    "routed_swiglu": "Routed feed-forward network",
    "rms_norm": "Routed RMSNorm",
    "rope_reorder": "RoPE and the way to sequence order",
    "swiglu": "SwiGLU",
    "reorder_rows": "Rows from tower order to sequence order",
}
INTRODUCTION = """\
# Performance

Made by `python -m benchmarks.harness.report` from [benchmarks/results](../benchmarks/results); edits here are lost. What a row
means and how the comparison is kept fair: [benchmarks/README.md](../benchmarks/README.md).

A ratio is our median time over that of the baseline, in one run, in turns: below 1 we are faster. Rates count useful
work: the visible area of the mask, GEMMs that asked-for gradients need, bytes that have to move. "Of ceiling" is the
share of what a large matmul of random numbers (for TFLOP/s) or a large copy (for GB/s) reached in the same run.
"""
NO_GPU = """
**No result of a GPU is committed. The CUDA and Triton kernels are untested on a GPU, and no figure on this page is one
of a GPU.** `make gpu OUTPUT=folder` measures one.
"""


def page(all_results: Sequence[Results], images: str) -> tuple[str, dict[str, str]]:
    """The page, and its plots by file name. images: the folder of the plots as seen from the page, with its slash."""
    parts = [INTRODUCTION]
    plots: dict[str, str] = {}
    if not any(results["device"]["type"] == "cuda" for results in all_results):
        parts.append(NO_GPU)
    for results in all_results:
        text, drawn = section(results, images)
        parts.append(text)
        plots |= drawn
    return "\n".join(parts), plots


def section(results: Results, images: str) -> tuple[str, dict[str, str]]:
    """What one device gave."""
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
    lines += ["", *_bars(rows), *_losses(rows)]
    plots = {}
    slug = file_name(results).rsplit("-", 3)[0]
    for op, title in {**TITLES, **{row["op"]: row["op"] for row in rows if row["op"] not in TITLES}}.items():
        of_op = [row for row in rows if row["op"] == op]
        if of_op:
            lines += [f"### {title}", ""]
            if groups := _groups(of_op):
                name = f"{PREFIX}{slug}-{op.replace('_', '-')}.svg"
                plots[name] = svg(title, groups)
                lines += [f"![{title}: bars of all contestants]({images}{name})", ""]
            lines += [*_ratios(of_op), *_details(of_op)]
    lines += _unmeasured(results["rows"])
    return "\n".join(lines), plots


def measured(row: Results) -> dict[str, Results]:
    return {name: line for name, line in row["contestants"].items() if line["status"] == "measured"}


def baselines(row: Results) -> dict[str, Results]:
    """Measured contestants that are not ours in another form and compute the same."""
    return {n: line for n, line in measured(row).items() if not n.startswith("ours") and not line.get("is_floor")}


def label(row: Results) -> str:
    case = f"{row['case']}, " if row["case"] else ""
    return f"{row['shape']}, {case}{row['tokens']:,} tokens"


def kind(row: Results) -> str:
    return f"{row['dtype'].replace('float', 'fp').replace('bfp', 'bf')} {row['direction']}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "| " + " | ".join(["---"] + ["---:"] * (len(header) - 1)) + " |",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def _bars(rows: Sequence[Results]) -> list[str]:
    promised = []
    for row in rows:
        where = TITLES.get(row["op"], str(row["op"])) + ": " + label(row), kind(row)
        for name, line in measured(row).items():
            if line.get("least"):
                value = ", ".join(f"{line.get(key, 0.0):.3g}" for key in line["least"])
                promised.append((*where, f"{name}: {', '.join(line['least'])}", value, verdict(line)))
            elif line.get("bar") is not None and "ratio" in line:
                promised.append((*where, f"ours / {name}", f"{line['ratio']:.2f}", verdict(line)))
    met = sum(line[-1].endswith("met") for line in promised)
    if not promised:
        return []
    text = f"{met} of {len(promised)} bars (ratios that we promise to stay below, rates that we promise) are met."
    missed = [line for line in promised if not line[-1].endswith("met")]
    if not missed:
        return ["### Bars", "", text, ""]
    return ["### Bars", "", f"{text} Missed:", "", *_table(["row", "", "what", "is", "bar"], missed)]


def _losses(rows: Sequence[Results]) -> list[str]:
    lost = []
    for row in rows:
        ours = row["contestants"][row["ours"]]
        for name, line in baselines(row).items():
            if line.get("ratio", 0) > 1:
                spread = max(ours["iqr_ms"], line["iqr_ms"])
                noise = "within the spread" if ours["median_ms"] - line["median_ms"] < spread else ""
                times = f"{ours['median_ms']:.3g}", f"{line['median_ms']:.3g}"
                where = TITLES.get(row["op"], str(row["op"])) + ": " + label(row)
                lost.append((line["ratio"], (where, kind(row), name, *times, f"{line['ratio']:.2f}", noise)))
    lines = ["### Where we lose", ""]
    if not lost:
        return [*lines, "No baseline of the same work was faster in any row.", ""]
    header = ["row", "", "faster baseline", "ours, ms", "it, ms", "ratio", ""]
    return [*lines, *_table(header, [line for _, line in sorted(lost, key=lambda item: -item[0])])]


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
    return _table(header, body)


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
    note = "Launches: kernels on a GPU, dispatched ops on a CPU. The first call compiles. A mask is built once a batch."
    return ["<details><summary>all lines</summary>", "", note, "", *_table(header, body), "</details>", ""]


def _cell(text: str) -> str:
    return text.replace("|", "/")[:160]


def _unmeasured(rows: Sequence[Results]) -> list[str]:
    """Rows without a number of ours."""
    missing = [row for row in rows if row["status"] != "measured"]
    if not missing:
        return []
    return ["### Not measured", "", *(f"- `{r['name']}` {r['status']}: {_cell(r['reason'])}" for r in missing), ""]


def _groups(rows: Sequence[Results]) -> list[Group]:
    """The rows of the last dtype (bfloat16 where there is more than one), enough to fill a picture and no more."""
    drawn = [row for row in rows if row["dtype"] == rows[-1]["dtype"]][:14]
    groups = []
    for row in drawn:
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


def committed() -> list[Results]:
    """The results of benchmarks/results, GPUs first."""
    found = [read_results(path) for path in sorted(RESULTS.glob("*.json"))]
    return sorted(found, key=lambda results: results["device"]["type"] != "cuda")


def keep(path: Path) -> Path:
    """Copy a run into benchmarks/results in place of what is there of its device. Returns where it is."""
    results = read_results(path)
    target = RESULTS / file_name(results)
    RESULTS.mkdir(exist_ok=True)
    for old in RESULTS.glob(target.name.rsplit("-", 3)[0] + "-[0-9]*.json"):
        old.unlink()
    target.write_text(json.dumps(results, indent=1) + "\n")
    return target


def write_page() -> None:
    text, plots = page(committed(), "images/")
    for old in IMAGES.glob(f"{PREFIX}*.svg"):
        old.unlink()
    for name, drawing in plots.items():
        (IMAGES / name).write_text(drawing)
    PAGE.write_text(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, help="a results.json; default: those that are committed")
    parser.add_argument("--keep", action="store_true", help="take it into benchmarks/results and renew the page")
    options = parser.parse_args(arguments)
    if options.results is None:
        if options.keep:
            parser.error("name a results.json")
        write_page()
    elif options.keep:
        print(keep(options.results))
        write_page()
    else:
        text, plots = page([read_results(options.results)], "")
        for name, drawing in plots.items():
            options.results.with_name(name).write_text(drawing)
        options.results.with_name("results.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
