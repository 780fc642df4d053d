"""Makes rows of the measured table from benchmark results.

`python -m lmfusion_kernels.attention.propose results.json` prints table.json with the rows of the devices in the
results replaced; results.json is a list of results as `propose` takes them.
"""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lmfusion_kernels.attention.table import DIRECTIONS, TableRow, load

_MARGIN = 0.98
"""A difference below 2 % is noise: the kernel that is fastest for fewer tokens stays."""


def propose(results: Iterable[Mapping[str, Any]]) -> list[TableRow]:
    """Rows from benchmark results: for each number of tokens the kernel with the least time over all patterns.

    results: one mapping each of capability ("9.0" or a pair), dtype, head_dim, num_tokens, pattern, direction
    ("forward" or "backward"), kernel and median_ms; other keys are ignored. The times of all patterns count equally,
    as a geometric mean, and a kernel that did not run all patterns of a size does not compete there. For "training" the
    times of forward and backward are added.

    Raises ValueError for a direction that is neither.
    """
    times: dict[tuple[str, str, int, int], dict[tuple[str, str], dict[str, float]]]
    times = defaultdict(lambda: defaultdict(dict))
    for result in results:
        if result["direction"] not in ("forward", "backward"):
            raise ValueError(f"the direction of a result must be forward or backward, got {result['direction']!r}")
        capability = result["capability"]
        capability = capability if isinstance(capability, str) else ".".join(map(str, capability))
        kind = (capability, str(result["dtype"]), int(result["head_dim"]), int(result["num_tokens"]))
        by_pattern = times[kind][result["kernel"], result["direction"]]
        by_pattern[result["pattern"]] = float(result["median_ms"])

    rows: list[TableRow] = []
    for kind in sorted(times):
        capability, dtype, head_dim, num_tokens = kind
        for direction in DIRECTIONS:
            means = _means(times[kind], direction)
            if not means:
                continue
            kernel = min(means, key=lambda name: (means[name], name))
            row = TableRow(capability, dtype, head_dim, direction, num_tokens, kernel)
            smaller = [other for other in rows if _kind(other) == _kind(row)]
            if not smaller:
                rows.append(replace(row, min_tokens=0))
            elif means[kernel] < _MARGIN * means.get(smaller[-1].kernel, math.inf):
                rows.append(row)
    return rows


def _kind(row: TableRow) -> TableRow:
    return replace(row, min_tokens=0, kernel="")


def _means(times: Mapping[tuple[str, str], Mapping[str, float]], direction: str) -> dict[str, float]:
    """Geometric mean over the patterns of each kernel that ran them all."""
    totals: dict[str, dict[str, float]] = {}
    for kernel, _ in times:
        forward, backward = times.get((kernel, "forward"), {}), times.get((kernel, "backward"), {})
        if direction == "forward":
            totals[kernel] = dict(forward)
        else:
            totals[kernel] = {pattern: forward[pattern] + backward[pattern] for pattern in forward.keys() & backward}
    patterns = set().union(*totals.values())
    return {
        kernel: math.exp(sum(math.log(time) for time in by_pattern.values()) / len(patterns))
        for kernel, by_pattern in totals.items()
        if patterns and by_pattern.keys() == patterns
    }


def merge(old: Iterable[TableRow], new: list[TableRow]) -> str:
    """The text of table.json with the rows of the devices in `new` replaced."""
    devices = {row.capability for row in new}
    rows = [row for row in old if row.capability not in devices] + new
    return "[" + ",".join("\n  " + json.dumps(asdict(row)) for row in rows) + ("\n]\n" if rows else "]\n")


if __name__ == "__main__":
    print(merge(load(), propose(json.loads(Path(sys.argv[1]).read_text()))), end="")
