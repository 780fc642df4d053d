"""The machine that a benchmark runs on: device, versions, commit, and measured ceilings."""

import datetime
import functools
import itertools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lmfusion_kernels as lk

ROOT = Path(__file__).resolve().parent.parent
NUM_THREADS = 2
CPU_COPY_BYTES, GPU_COPY_BYTES = 2**29, 2**31
CPU_MATMUL_SIZE, GPU_MATMUL_SIZE = 2048, 8192


def benchmark_device() -> torch.device:
    """The first CUDA device, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """Bytes of the L2 of the device, or of one CPU core. The L3 of a CPU is ignored; see benchmarks/README.md."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    return int(sizes.read_text().strip().removesuffix("K")) * 1024 if sizes.exists() else 2**21


def _median_seconds(call: Callable[[], object], device: torch.device, rounds: int = 7, warmup: int = 2) -> float:
    """Seconds of a call. On a GPU measured by CUDA events, with enough queued work to hide launching."""
    if device.type != "cuda":
        seconds = []
        for _ in range(warmup + rounds):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[warmup:])
    events = [torch.cuda.Event(enable_timing=True) for _ in range(warmup + rounds + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    synchronize(device)
    return statistics.median(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events[warmup:]))


@functools.cache
def copy_gigabytes_per_second(device: torch.device) -> float:
    """Bytes read and written per second by a copy between two tensors far larger than any cache."""
    num_bytes = GPU_COPY_BYTES if device.type == "cuda" else CPU_COPY_BYTES
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _median_seconds(lambda: target.copy_(source), device) / 1e9


@functools.cache
def matmul_teraflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of torch.mm on square matrices of normal random numbers; zeros would be faster on a GPU."""
    size = GPU_MATMUL_SIZE if device.type == "cuda" else CPU_MATMUL_SIZE
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _median_seconds(lambda: torch.mm(a, b), device) / 1e12


@functools.cache
def describe(device: torch.device) -> dict[str, Any]:
    """The head of a results file: machine, versions, commit and date."""
    versions: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "diffusers", "transformers", "flash-attn", "flash-attn-4", "quack-kernels"):
        versions[package] = _version(package)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        versions |= {"cuda": torch.version.cuda, "driver": _output("nvidia-smi", "--query-gpu=driver_version",
                                                                    "--format=csv,noheader")}  # fmt: skip
        machine = {
            "name": properties.name,
            "type": "cuda",
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    else:
        machine = {"name": _cpu_name(), "type": "cpu", "threads": torch.get_num_threads(), "cores": os.cpu_count()}
        machine["capability"] = torch.backends.cpu.get_cpu_capability()
    machine["l2_mib"] = cache_bytes(device) / 2**20
    status = _output("git", "status", "--porcelain", "--untracked-files=no", ":!benchmarks/results", ":!docs")
    return {
        "device": machine,
        "versions": {name: version for name, version in versions.items() if version},
        "backends": _backends(),
        "commit": _output("git", "rev-parse", "--short", "HEAD") + ("+changes" if status else ""),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def ceilings(device: torch.device, dtypes: list[torch.dtype]) -> dict[str, Any]:
    """The measured ceilings for a results file."""
    return {
        "copy_gb_s": round(copy_gigabytes_per_second(device), 1),
        "matmul_tflop_s": {name(dtype): round(matmul_teraflops(device, dtype), 3) for dtype in dtypes},
    }


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _backends() -> list[str]:
    try:
        return repr(lk.backends()).splitlines()[1:]
    except Exception as error:  # it must not cost the measurements
        return [f"lmfusion_kernels.backends() failed: {error!r}"]


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
