"""Writes results: the file results.json, and the table for the terminal.

results.json: {"schema": 1, "device", "versions", "backends", "commit", "date", "ceilings", "wall_s", "rows": [...]}.
A row holds op, case, shape, dtype, direction, tokens, flops or bytes, status, and per contestant: status with reason,
or median_ms, iqr_ms, tflop_s or gb_s, share_of_ceiling, ratio (our median over its median), bar, kernels or ops, syncs,
busy_ms and busy_share (of the median, in which the device is busy), peak_mib, mask_ms (built once per batch),
first_call_s (including compilation).
"""

import json
import re
from pathlib import Path
from typing import Any

SCHEMA = 1


def write_results(results: dict[str, Any], folder: Path) -> Path:
    """Write results.json into `folder`, rounded to four digits, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    path.write_text(json.dumps(_rounded({"schema": SCHEMA, **results}), indent=1) + "\n")
    return path


def read_results(path: Path) -> dict[str, Any]:
    """Read a results file. Raises ValueError if it does not have this schema."""
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} must be a JSON file as LMFUSION_BENCHMARK_OUTPUT=folder writes it, got {error}"
        ) from None
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise ValueError(f"{path} must be a results file of schema {SCHEMA}; measure again")
    return results


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def file_name(results: dict[str, Any]) -> str:
    """The file name of results under benchmarks/results: device and date."""
    device = results["device"]
    words = [device["type"], device["name"]] + ([device["capability"]] if device["type"] == "cpu" else [])
    slug = re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower().replace("(r)", "")).strip("-")
    return f"{slug}-{results['date']}.json"


def speed_of(line: dict[str, Any]) -> str:
    if "tflop_s" in line:
        return f"{line['tflop_s']:.3g} TFLOP/s"
    return f"{line['gb_s']:.3g} GB/s" if "gb_s" in line else ""


def launches_of(line: dict[str, Any]) -> str:
    """Kernels (GPU) or ops (CPU) per call, syncs if there are any, and the share of the time in which a GPU is busy."""
    kind = "kernels" if "kernels" in line else "ops"
    if line.get(kind) is None:
        return ""
    syncs = f" + {line['syncs']} syncs" if line.get("syncs") else ""
    return f"{line[kind]}{syncs}" + (f", {100 * line['busy_share']:.0f} % busy" if "busy_share" in line else "")


def verdict(line: dict[str, Any]) -> str:
    """Whether a bar is met: a ratio to stay below, or values to reach."""
    if promised := line.get("least"):
        met = all(line.get(name, 0.0) >= value for name, value in promised.items())
        return f">= {', '.join(f'{value:g}' for value in promised.values())} {'met' if met else 'MISSED'}"
    if line.get("bar") is None:
        return ""
    if "ratio" not in line:
        return f"{line['bar']:.2f}"
    return f"{line['bar']:.2f} {'met' if line['ratio'] <= line['bar'] else 'MISSED'}"


def table(results: dict[str, Any]) -> str:
    """All rows as text."""
    device, ceilings = results["device"], results["ceilings"]
    matmul = ", ".join(f"{dtype} {rate:.3g}" for dtype, rate in ceilings["matmul_tflop_s"].items())
    lines = [
        f"{device['name']}, {', '.join(f'{name} {version}' for name, version in results['versions'].items())}",
        f"commit {results['commit']}, {results['date']}, {results['wall_s']:.0f} s in total",
        f"ceilings: copy {ceilings['copy_gb_s']:.4g} GB/s; matmul TFLOP/s {matmul}",
        "ratio: our median over its median. launches: " + ("kernels" if device["type"] == "cuda" else "ops dispatched"),
        f"{'':50s} {'ms':>10s} {'IQR':>8s} {'rate':>14s} {'ceiling':>7s} {'ratio':>6s} {'bar':>11s} "
        f"{'launches':>14s} {'peak MiB':>8s} {'mask ms':>8s} {'1st s':>6s}",
    ]
    for row in results["rows"]:
        lines.append(row["name"])
        if not row["contestants"]:
            lines.append(f"  {row['status']}: {row['reason']}")
        for name, line in row["contestants"].items():
            if line["status"] != "measured":
                lines.append(f"  {name[:48]:48s} {line['status']}: {line['reason'][:110]}")
                continue
            share = f"{100 * line['share_of_ceiling']:.0f} %" if "share_of_ceiling" in line else ""
            lines.append(
                f"  {name[:48]:48s} {line['median_ms']:10.3f} {line['iqr_ms']:8.3f} {speed_of(line):>14s} {share:>7s} "
                f"{_number(line.get('ratio'), '.2f'):>6s} {verdict(line):>11s} {launches_of(line):>14s} "
                f"{_number(line.get('peak_mib'), '.0f'):>8s} {_number(line.get('mask_ms'), '.2f'):>8s} "
                f"{line['first_call_s']:6.2f}"
            )
    return "\n".join(lines)


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
