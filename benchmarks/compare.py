"""How are two or more ways of doing the same thing timed against each other? In one run, in turns, by medians."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved_seconds(
    contestants: Mapping[str, Callable[[], object]], rounds: int = 25, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of each call, taken in turns (A B C A B C ...) so that drift of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_index in range(warmup + rounds):
        for name, call in contestants.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def record(
    benchmark,
    contestants: Mapping[str, Callable[[], object]],
    ours: str,
    bars: Mapping[str, float],
    flops: float | None = None,
    num_bytes: float | None = None,
    rounds: int = 25,
) -> dict[str, float]:
    """Time all contestants in turns and put medians and ratios into the `extra_info` of pytest-benchmark.

    bars: for a baseline's name, the ratio of our median to its median that we promise to stay below. Returns the
    ratios.
    A bar that is missed is shown in the table, it does not fail the run: a loaded machine is no bug.
    """
    seconds = interleaved_seconds(contestants, rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    benchmark.pedantic(contestants[ours], rounds=5)  # its own table; the ratios come from the turns above
    ratios = {name: medians[ours] / medians[name] for name in contestants if name != ours}
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in seconds.items()}
    benchmark.extra_info.update(
        ours=ours,
        median_ms={name: 1e3 * value for name, value in medians.items()},
        spread_ms={name: 1e3 * (q[2] - q[0]) for name, q in quartiles.items()},
        ratios=ratios,
        bars=dict(bars),
        gflop_per_second=None if flops is None else flops / medians[ours] / 1e9,
        gigabyte_per_second=None if num_bytes is None else num_bytes / medians[ours] / 1e9,
    )
    return ratios
