"""Times several contestants that do the same work: in turns, on rotating buffers, by medians.

Outputs are compared before anything is timed. On a GPU times are CUDA events, on a CPU perf_counter. A contestant that
cannot run is a line with the reason. A missed bar is shown but fails nothing, because a loaded machine is not a bug.
"""

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import machine
from benchmarks.harness.counting import count

CACHE_FACTOR = 3  # buffer sets together exceed the L2 this many times
MOST_SETS = 12
FEWEST_ROUNDS, MOST_ROUNDS = 7, 40
SECONDS_PER_ROW = {"cpu": 1.0, "cuda": 0.4}
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest norm of a difference, relative to the norm of our result. The float32 limit has room for TF32."""


class UnavailableError(Exception):
    """A contestant is not available: a package, a backend, a GPU. The message says how to get it."""


@contextlib.contextmanager
def unavailable_if_refused() -> Iterator[None]:
    """Turn a ValueError of the package into an UnavailableError: the row then shows its reason."""
    try:
        yield
    except ValueError as error:
        raise UnavailableError(str(error)) from None


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors of nested tuples and lists, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors_of(part)]


@dataclass(frozen=True)
class Contestant:
    """One way of doing the work that a row times."""

    prepare: Callable[[int], Callable[[], Any]]
    """prepare(seed) samples its own inputs and returns the call to time. Equal seeds give equal inputs to everyone."""
    results: Callable[[Any], Any] = tensors_of
    """Takes the result of the call, and returns the tensors that must be equal for all contestants."""
    mask: Callable[[], object] | None = None
    """Builds what the attention mask needs, once per batch. Timed separately."""
    is_floor: bool = False
    """It does less work on purpose (one tower, no mask): a floor, whose outputs cannot be compared."""
    is_compiled: bool = False
    """Some of its code is compiled, so that the op counter of a CPU does not see it."""


@dataclass(frozen=True)
class Row:
    """The description of a row, and its bars."""

    op: str
    case: str
    dtype: torch.dtype
    direction: str
    """"forward" or "forward+backward"."""
    shape: str
    tokens: int
    flops: float | None = None
    """Useful FLOPs: of the visible mask area, and of the GEMMs that the requested gradients need."""
    num_bytes: float | None = None
    """Bytes that have to be read and written."""
    set_bytes: int | None = None
    """Bytes of one set of inputs. Default: num_bytes, or if there are none, one set is used."""
    bars: Mapping[str, float] = field(default_factory=dict)
    """By name of contestant: the ratio of our median to its median that we promise to stay below."""
    least: Mapping[str, float] = field(default_factory=dict)
    """By "tflop_s" or "share_of_ceiling": the value that we promise to reach."""
    is_latency: bool = False
    """Wait before every call, so that launch time counts, as it does for small batches."""


def compare(row: Row, contestants: Mapping[str, Contestant], ours: str, device: torch.device) -> dict[str, Any]:
    """Check, count and time all contestants of a row. Returns the row as results.json holds it."""
    lines: dict[str, dict[str, Any]] = {}
    calls: dict[str, list[Callable[[], Any]]] = {}
    expected: list[Tensor] | None = None
    num_sets = _num_sets(row, device)
    for name in [ours, *(name for name in contestants if name != ours)]:
        contestant = contestants[name]
        lines[name] = line = {"status": "measured", "is_floor": contestant.is_floor}
        try:
            first = contestant.prepare(0)
            machine.synchronize(device)
            start = time.perf_counter()
            result = first()
            machine.synchronize(device)
            line["first_call_s"] = time.perf_counter() - start
            if not contestant.is_floor:
                results = [tensor.detach().clone() for tensor in contestant.results(result)]
                if expected is None and name == ours:
                    expected = results
                elif expected is not None and (why := difference(results, expected, row.dtype)):
                    raise ArithmeticError(why)
            del result
            line |= count(first, device, contestant.is_compiled).as_dict()
            if contestant.mask is not None:
                line["mask_ms"] = 1e3 * _mask_seconds(contestant.mask, device)
            calls[name] = [first, *(contestant.prepare(seed) for seed in range(1, num_sets))]
        except Exception as error:  # any error is this contestant's line and must not stop the others
            lines[name] = unsupported_reason(error)
            calls.pop(name, None)
    seconds = _timed(calls, device, row.is_latency)
    for name, values in seconds.items():
        lines[name] |= _speed(values, row, device)
        if "busy_ms" in lines[name]:
            lines[name]["busy_share"] = min(1.0, lines[name]["busy_ms"] / lines[name]["median_ms"])
    del calls
    _free(device)
    ours_ms = lines[ours].get("median_ms")
    lines[ours]["least"] = dict(row.least)
    for name, line in lines.items():
        line["bar"] = row.bars.get(name)
        if name != ours and ours_ms is not None and "median_ms" in line:
            line["ratio"] = ours_ms / line["median_ms"]
    return {
        "op": row.op, "case": row.case, "dtype": machine.name(row.dtype), "direction": row.direction,
        "shape": row.shape, "tokens": row.tokens, "is_latency": row.is_latency, "buffer_sets": num_sets,
        "flops": row.flops, "bytes": row.num_bytes, "ours": ours, "status": lines[ours]["status"],
        "reason": lines[ours].get("reason"), "contestants": lines,
    }  # fmt: skip


def unsupported_reason(error: BaseException) -> dict[str, Any]:
    """The line of a contestant that raised: skipped if it is not available, else failed."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": "failed", "reason": "out of memory"}
    if isinstance(error, UnavailableError | ImportError):
        return {"status": "skipped", "reason": text}
    return {"status": "failed", "reason": f"{type(error).__name__}: {text}"}


def difference(results: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> str:
    """Describes the first result that differs from ours by more than rounding; "" if there is none."""
    if len(results) != len(expected):
        return f"returns {len(results)} tensors, ours {len(expected)}"
    for index, (result, target) in enumerate(zip(results, expected, strict=True)):
        if result.shape != target.shape:
            return f"tensor {index} has shape {tuple(result.shape)}, ours {tuple(target.shape)}"
        if target.numel() == 0:
            continue
        distance, size = ((t.float().norm().item()) for t in (result.float() - target.float(), target))
        if not distance <= TOLERANCES[dtype] * size:
            return f"tensor {index} differs from ours by {distance / max(size, 1e-30):.2g} of its norm"
    return ""


def graphed(contestant: Contestant) -> Contestant:
    """The contestant captured once as a CUDA graph and replayed, without the cost of launching."""

    def prepare(seed: int) -> Callable[[], Any]:
        call = contestant.prepare(seed)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    return Contestant(prepare, contestant.results, contestant.mask, contestant.is_floor, contestant.is_compiled)


def _num_sets(row: Row, device: torch.device) -> int:
    set_bytes = row.set_bytes or row.num_bytes
    if not set_bytes:
        return 1
    return min(MOST_SETS, max(1, math.ceil(CACHE_FACTOR * machine.cache_bytes(device) / set_bytes)))


def _mask_seconds(build: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(4):
        machine.synchronize(device)
        start = time.perf_counter()
        build()
        machine.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _timed(
    calls: Mapping[str, Sequence[Callable[[], Any]]], device: torch.device, is_latency: bool
) -> dict[str, list[float]]:
    """Seconds of each call, measured in turns (A B C A B C ...), so that drift of the machine affects all alike."""
    start = time.perf_counter()
    for sets in calls.values():
        for call in sets:
            call()
    machine.synchronize(device)
    one_round = (time.perf_counter() - start) / max((len(sets) for sets in calls.values()), default=1)
    rounds = round(min(MOST_ROUNDS, max(FEWEST_ROUNDS, SECONDS_PER_ROW[device.type] / max(one_round, 1e-9))))
    take = _turns_on_gpu if device.type == "cuda" else _turns_on_cpu
    gc.collect()
    gc.disable()
    try:
        return take(calls, rounds, is_latency)
    finally:
        gc.enable()


def _turns_on_cpu(
    calls: Mapping[str, Sequence[Callable[[], Any]]], rounds: int, is_latency: bool
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, sets in calls.items():
            call = sets[turn % len(sets)]
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _turns_on_gpu(
    calls: Mapping[str, Sequence[Callable[[], Any]]], rounds: int, is_latency: bool
) -> dict[str, list[float]]:
    # A fill of about 0.1 ms before each call: the host queues the call meanwhile, so that the time is the kernel's own
    # and not that of its launch. The fill also evicts from the L2 what the previous call left there, weights included.
    cushion = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, sets in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cushion.fill_(turn % 128)
            if is_latency:
                torch.cuda.synchronize()
            begin.record()
            sets[turn % len(sets)]()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in events.items()}


def _speed(seconds: Sequence[float], row: Row, device: torch.device) -> dict[str, Any]:
    median = statistics.median(seconds)
    quartiles = statistics.quantiles(seconds, n=4)
    speed: dict[str, Any] = {
        "median_ms": 1e3 * median,
        "iqr_ms": 1e3 * (quartiles[2] - quartiles[0]),
        "rounds": len(seconds),
    }
    if row.flops is not None:
        speed["tflop_s"] = row.flops / median / 1e12
        speed["share_of_ceiling"] = speed["tflop_s"] / machine.matmul_teraflops(device, row.dtype)
    elif row.num_bytes is not None:
        speed["gb_s"] = row.num_bytes / median / 1e9
        speed["share_of_ceiling"] = speed["gb_s"] / machine.copy_gigabytes_per_second(device)
    return speed


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
