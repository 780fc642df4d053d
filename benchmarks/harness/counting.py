"""Counts what one call launches, waits for and allocates: kernels and host syncs on a GPU, dispatched ops on a CPU.

On a GPU torch.profiler (CUPTI) counts. A CPU has no launches, so ops seen by a TorchDispatchMode stand in for them:
eager CUDA runs about one kernel per op. Such counts carry the label "ops", never "kernels".
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SYNC_CALLS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cuStreamSynchronize",
    "cuCtxSynchronize",
)
# These launch no kernel on a GPU. Other ops without a kernel are recognised as views by their schema.
ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::detach")

PRODUCTS_INSIDE = {"lmfusion::routed_linear": 2}
"""Ops written in Python, whose inner ops no dispatch mode sees, and how many launches they stand for."""


@dataclass(frozen=True)
class Counts:
    """The counts of one call; None if a count is unknown."""

    kernels: int | None = None
    copies: int | None = None
    ops: int | None = None
    syncs: int | None = None
    peak_mib: float | None = None
    """Peak memory allocated during the call, beyond what was allocated before."""
    busy_ms: float | None = None
    """How long the GPU was busy during the call, without gaps between kernels."""

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def count(call: Callable[[], object], device: torch.device, is_compiled: bool) -> Counts:
    """The counts of one call. is_compiled: some of it is compiled code, which no dispatch mode sees."""
    if device.type == "cuda":
        return _count_on_gpu(call)
    if is_compiled:
        return Counts()
    with _OpCounter() as counter:
        call()
    return Counts(ops=counter.ops, syncs=counter.syncs)


class _OpCounter(TorchDispatchMode):
    """Counts ops that would launch something, and ops that would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_view(func) and func._schema.name not in ALLOCATIONS:
            self.ops += PRODUCTS_INSIDE.get(func._schema.name, 1)
            self.syncs += waits_for_device(func, args)
        return func(*args, **(kwargs or {}))


def is_view(func: Any) -> bool:
    aliases = [result.alias_info for result in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def waits_for_device(func: Any, args: Any) -> bool:
    """Whether the op needs a value or a count on the host: .item(), nonzero, indexing with a boolean mask."""
    name = func._schema.name
    if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique_dim"):
        return True
    if name in ("aten::index", "aten::index_put", "aten::index_put_"):
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return False


def _count_on_gpu(call: Callable[[], object]) -> Counts:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    (kernels, copies, syncs), busy_ms = _profile(call)
    syncs = max(0, syncs - _own_syncs())
    return Counts(kernels=kernels, copies=copies, syncs=syncs, peak_mib=peak / 2**20, busy_ms=busy_ms)


@functools.cache
def _own_syncs() -> int:
    """The number of syncs of the profiler itself and of the end of its region."""
    return _profile(lambda: None)[0][2]


def _profile(call: Callable[[], object]) -> tuple[tuple[int, int, int], float]:
    """`tally` of a call's events, and for how many milliseconds the device was busy."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    events = [(event, event.device_type == torch.autograd.DeviceType.CUDA) for event in profile.events()]
    at_work = [(event.time_range.start, event.time_range.end) for event, on_device in events if on_device]
    return tally((event.name, on_device) for event, on_device in events), covered(at_work) / 1e3


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end), because kernels may overlap."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def tally(events: Iterable[tuple[str, bool]]) -> tuple[int, int, int]:
    """The number of kernels, copies (memset included) and syncs among events (name, whether it ran on the device)."""
    kernels = copies = syncs = 0
    for name, on_device in events:
        if not on_device:
            syncs += name in SYNC_CALLS
        elif name.startswith(("Memcpy", "Memset")):
            copies += 1
        else:
            kernels += 1
    return kernels, copies, syncs
