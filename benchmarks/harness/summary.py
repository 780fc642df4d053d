"""Writes docs/performance.md: one page that summarises the committed results. The tables of all rows are beside
them."""

import statistics
import textwrap
from collections.abc import Sequence

from benchmarks.harness.output import file_name
from benchmarks.harness.tables import (
    NO_GPU,
    TITLES,
    Results,
    bars_section,
    baselines,
    has_gpu,
    kind,
    markdown_table,
    plot_name,
    title_of,
)

INTRODUCTION = """\
# Performance

`python -m benchmarks.harness.report` writes this page from [benchmarks/results](../benchmarks/results); edits here are
lost. Every row stands beside the strongest rival: the fastest measured baseline that does the same work. The ratio is
our median time over the rival's, measured in turns in one run; below 1 we are faster.
"""
HOW_TO_MEASURE = """\
## How to measure

```
LMFUSION_BENCHMARK_OUTPUT=runs/bench make bench                     # this machine, in less than five minutes
python -m benchmarks.harness.report runs/bench/results.json         # all rows as results.md, with plots, beside it
python -m benchmarks.harness.report --keep runs/bench/results.json  # commit it: benchmarks/results and this page
make gpu OUTPUT=folder                                              # on a GPU: tests first, then benchmarks
```

What a row means, which baselines there are and what keeps the comparison fair:
[benchmarks/README.md](../benchmarks/README.md).
"""


def summary_page(all_results: Sequence[Results], images: str, tables: str) -> str:
    """The page as Markdown. images, tables: paths from the page to the folders of plots and of results, with a
    slash."""
    parts = [INTRODUCTION]
    if not has_gpu(all_results):
        parts.append(NO_GPU)
    parts += [_section(results, images, tables) for results in all_results]
    return "\n".join([*parts, HOW_TO_MEASURE])


def strongest(row: Results) -> tuple[str, float] | None:
    """The fastest baseline of the same work, and our time over its time; None if we or all baselines have no time."""
    rivals = {name: line for name, line in baselines(row).items() if "ratio" in line}
    if not rivals:
        return None
    name = min(rivals, key=lambda name: rivals[name]["median_ms"])
    return name, rivals[name]["ratio"]


def _section(results: Results, images: str, tables: str) -> str:
    device, ceilings = results["device"], results["ceilings"]
    rows = [(row, *found) for row in results["rows"] if row["contestants"] and (found := strongest(row))]
    faster = sum(ratio < 1 for *_, ratio in rows)
    matmul = " and ".join(f"{rate:.3g} TFLOP/s in {dtype}" for dtype, rate in ceilings["matmul_tflop_s"].items())
    details = ", ".join(f"{name} {value}" for name, value in device.items() if name not in ("name", "type"))
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    measured = (
        f"Measured on {results['date']} at commit {results['commit']} ({details}; {versions}). In the same run a large "
        f"copy reached {ceilings['copy_gb_s']:.4g} GB/s, and a large matmul {matmul}."
    )
    lines = [
        f"## {device['name']}",
        "",
        textwrap.fill(measured, 120),
        "",
        f"**We are faster than the strongest rival in {faster} of {len(rows)} rows.**",
        f"[All rows with all contestants]({tables}{file_name(results).removesuffix('.json')}.md).",
        "",
        *_by_op(rows),
        *_losses(rows),
        *bars_section([row for row in results["rows"] if row["contestants"]]),
        *_plots(results, images),
    ]
    return "\n".join(lines)


def _by_op(rows: Sequence[tuple[Results, str, float]]) -> list[str]:
    """One line per op, dtype and direction."""
    groups: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for row, name, ratio in rows:
        groups.setdefault((str(row["op"]), kind(row)), []).append((name, ratio))
    order = [*TITLES, *(op for op, _ in groups if op not in TITLES)]
    body = []
    for (op, kind_), found in sorted(groups.items(), key=lambda item: order.index(item[0][0])):
        ratios = [ratio for _, ratio in found]
        rivals = " / ".join(dict.fromkeys(name for name, _ in found))
        faster = f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)}"
        values = (f"{value:.2f}" for value in (min(ratios), statistics.median(ratios), max(ratios)))
        body.append((f"{TITLES.get(op, op)}, {kind_}", faster, *values, rivals))
    return markdown_table(["", "faster in", "best ratio", "median", "worst", "strongest rivals"], body)


def _losses(rows: Sequence[tuple[Results, str, float]]) -> list[str]:
    """The rows in which the strongest rival is faster, the worst first."""
    lost = sorted((item for item in rows if item[2] > 1), key=lambda item: -item[2])
    lines = ["### Where we lose", ""]
    if not lost:
        return [*lines, "No baseline of the same work was faster in any row.", ""]
    body = []
    for row, name, ratio in lost:
        ours, rival = row["contestants"][row["ours"]], row["contestants"][name]
        noise = (
            "within the spread" if ours["median_ms"] - rival["median_ms"] < max(ours["iqr_ms"], rival["iqr_ms"]) else ""
        )
        times = f"{ours['median_ms']:.3g}", f"{rival['median_ms']:.3g}"
        body.append((title_of(row), kind(row), name, *times, f"{ratio:.2f}", noise))
    return [*lines, *markdown_table(["row", "", "strongest rival", "ours, ms", "rival, ms", "ratio", ""], body)]


def _plots(results: Results, images: str) -> list[str]:
    """Links to the plots that tables.py draws: of the ops with a time of ours."""
    ops = dict.fromkeys(
        row["op"] for row in results["rows"] if row["contestants"] and "median_ms" in row["contestants"][row["ours"]]
    )
    links = [f"[{TITLES.get(op, op)}]({images}{plot_name(results, op)})" for op in ops]
    return (
        [
            "### Plots",
            "",
            "Times of all contestants relative to ours:",
            *(f"{link}," for link in links[:-1]),
            f"{links[-1]}.",
            "",
        ]
        if links
        else []
    )
