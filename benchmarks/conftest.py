"""Two threads, random data, and one table at the end: median, spread, rate, ratio to each baseline, promised bar."""

import os
import platform

import torch

NUM_THREADS = 2


def pytest_configure(config):
    torch.set_num_threads(min(NUM_THREADS, os.cpu_count() or 1))


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    rows = [b for b in session.benchmarks if b.extra_info.get("ratios")] if session else []
    if not rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section("ratios to the baselines of the same run")
    write(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    header = f"{'benchmark':60s} {'contestant':34s} {'median ms':>10s} {'spread':>8s} {'ours / it':>9s} {'bar':>6s}"
    write(header)
    for b in rows:
        info = b.extra_info
        rate = info.get("gflop_per_second"), info.get("gigabyte_per_second")
        unit = f"  {rate[0]:.0f} GFLOP/s" if rate[0] else f"  {rate[1]:.1f} GB/s" if rate[1] else ""
        for name, median in info["median_ms"].items():
            ratio, bar = info["ratios"].get(name), info["bars"].get(name)
            mark = "" if bar is None else "  met" if ratio <= bar else "  MISSED"
            write(
                f"{b.name[:60]:60s} {name[:34]:34s} {median:10.3f} {info['spread_ms'][name]:8.3f} "
                f"{'' if ratio is None else format(ratio, '.2f'):>9s} {'' if bar is None else format(bar, '.2f'):>6s}"
                f"{unit if name == info['ours'] else mark}"
            )
