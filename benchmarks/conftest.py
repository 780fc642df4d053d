"""Runs the benchmarks: one row per test, a table at the end, and results.json if LMFUSION_BENCHMARK_OUTPUT is a folder.

CPU runs use two threads. A run ends within five minutes: rows without time are skipped and say so.

pytest-benchmark chooses what runs (--benchmark-only), and its JSON holds the rows as extra_info. Its own table is left
out, because host clocks say nothing about a GPU.
"""

import importlib.util
import os
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # first calls show what compiling takes

from benchmarks.harness import machine, shapes
from benchmarks.harness.compare import compare, unsupported_reason
from benchmarks.harness.output import table, write_results

# A GPU machine may have only torch and the needs of the kernels.
NEEDED = ("transformers", "diffusers", "gguf", "safetensors")
NEED_THEM = ["test_training_step.py", "test_generation.py", "test_generation_step.py"]
collect_ignore = [] if all(importlib.util.find_spec(name) for name in NEEDED) else NEED_THEM

FILES = (
    "test_routed_block",
    "test_training_step",
    "test_generation",
    "test_generation_step",
    "test_hybrid_attention",
    "test_rms_norm",
    "test_rope_reorder",
    "test_swiglu",
    "test_decode",
    "test_denoise_step",
)
LIMIT_SECONDS = float(os.environ.get("LMFUSION_BENCHMARK_SECONDS", "285"))
ROWS = pytest.StashKey[dict]()
"""The rows of the run, by position in the table."""
POSITION = pytest.StashKey[int]()
START = pytest.StashKey[float]()


def pytest_configure(config):
    torch.set_num_threads(min(machine.NUM_THREADS, os.cpu_count() or 1))
    config.option.benchmark_quiet = True
    config.stash[ROWS] = {}
    config.stash[START] = time.perf_counter()


def pytest_collection_modifyitems(items):
    """Run the most important rows first, alternating between benchmarks: time is limited, and each needs some rows."""

    def importance(item):
        return FILES.index(item.path.stem) if item.path.stem in FILES else len(FILES)

    items.sort(key=importance)
    num_before = Counter()
    turn = {}
    for position, item in enumerate(items):
        item.stash[POSITION] = position
        turn[item] = num_before[item.path, item.originalname]
        num_before[item.path, item.originalname] += 1
    items.sort(key=turn.__getitem__)


@pytest.fixture
def device():
    return machine.benchmark_device()


@pytest.fixture
def record(benchmark, request, device):
    """Measure a row: record(row, contestants, ours="ours"). The test fails if our contestant does, after it is
    written."""

    spent = time.perf_counter() - request.config.stash[START]
    if spent > LIMIT_SECONDS:
        pytest.skip(f"{spent:.0f} of {LIMIT_SECONDS:.0f} s are used up; LMFUSION_BENCHMARK_SECONDS=600 gives more time")

    def measure(row, contestants, ours="ours"):
        result = {"name": request.node.name, **compare(row, contestants, ours, device)}
        keep(request.node, result)
        benchmark.extra_info.update(result)
        if result["status"] != "measured":
            pytest.fail(f"{ours}: {result['reason']}", pytrace=False)
        call = contestants[ours].prepare(0)

        def call_and_wait():
            call()
            machine.synchronize(device)

        benchmark.pedantic(call_and_wait, rounds=3, warmup_rounds=1)
        return result

    return measure


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that ends before it measured anything is also a row, with the reason."""
    outcome = yield
    report = outcome.get_result()
    if call.excinfo is None or report.passed or item.stash[POSITION] in item.config.stash[ROWS]:
        return
    line = unsupported_reason(call.excinfo.value)
    if report.skipped:
        line = {"status": "skipped", "reason": str(call.excinfo.value)}
    keep(item, {"name": item.name, "op": item.path.stem.removeprefix("test_"), **line, "contestants": {}})


def keep(item, row):
    """Add a row. The file is written again each time, so that an interrupted run keeps its rows."""
    item.config.stash[ROWS][item.stash[POSITION]] = row
    if folder := os.environ.get("LMFUSION_BENCHMARK_OUTPUT"):
        write_results(results_so_far(item.config), Path(folder))


def results_so_far(config):
    device = machine.benchmark_device()
    return {
        **machine.describe(device),
        "ceilings": machine.ceilings(device, shapes.DTYPES),
        "wall_s": round(time.perf_counter() - config.stash[START], 1),
        "rows": [row for _, row in sorted(config.stash[ROWS].items())],
    }


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    results = results_so_far(config)
    terminalreporter.section("each row beside its baselines, in one run")
    terminalreporter.write(table(results) + "\n")
    if folder := os.environ.get("LMFUSION_BENCHMARK_OUTPUT"):
        terminalreporter.write_line(f"written: {write_results(results, Path(folder))}")
