"""Report: `backends()` lists the implementations that are available here, which are chosen, and why the rest is not."""

import os
from dataclasses import dataclass

import torch

from lmfusion_kernels.attention import dispatch
from lmfusion_kernels.layout import build
from lmfusion_kernels.runtime import library
from lmfusion_kernels.runtime.backends import (
    ATTENTION_KERNELS,
    VARIABLE,
    native_unavailable_reason,
    requested_backend,
)


@dataclass(frozen=True)
class Backend:
    """One line of `backends()`."""

    available: bool
    chosen_for: tuple[str, ...]
    """Device types whose tensors it gets if no backend is requested."""
    detail: str
    """What it is, or why it is not available."""


class Backends(dict[str, Backend]):
    """The backends by name; prints as a table."""

    note = ""
    """What LMFUSION_KERNELS_BACKEND asks for, and where it cannot run; empty if it is not set."""

    def __repr__(self) -> str:
        lines = [f"lmfusion_kernels with torch {torch.__version__}:"]
        for name, backend in self.items():
            chosen = "chosen for " + ", ".join(backend.chosen_for) if backend.chosen_for else "available"
            lines.append(f"  {name:12} {chosen if backend.available else 'not here':21} {backend.detail}")
        return "\n".join([*lines, self.note] if self.note else lines)


def backends() -> Backends:
    """What is available here, what is chosen, and why the rest is not.

    First the ops without attention, by device; then the attention kernels (on the CPU, native-cpu has one too); last
    the reference. `chosen_for` is about float32 and bfloat16 tensors, `note` about LMFUSION_KERNELS_BACKEND. Does not
    raise, even if that variable names something unknown.
    """
    requested = os.environ.get(VARIABLE) or None
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    result = Backends()
    for device in ("cpu", "cuda"):
        where = torch.device("cuda", torch.cuda.current_device()) if device in devices[1:] else torch.device(device)
        reason = library.unavailable_reason or native_unavailable_reason(where)
        if not reason and device not in devices:
            reason = "torch finds no CUDA device"
        is_chosen = not reason and requested in (None, "native", *ATTENTION_KERNELS)
        result[f"native-{device}"] = Backend(not reason, (device,) if is_chosen else (), reason or _describe(device))
    result.update(_attention_kernels(requested))
    rest: tuple[str, ...] = ()
    if requested in (None, "reference"):
        rest = tuple(device for device in devices if not result[f"native-{device}"].chosen_for)
    result["reference"] = Backend(
        True, rest, "plain PyTorch, every dtype and device; also for what no other backend takes"
    )
    result.note = _note(requested, result)
    return result


def _attention_kernels(requested: str | None) -> dict[str, Backend]:
    """The attention kernels on CUDA devices. FlexAttention also runs on the CPU, for comparison."""
    has_cuda = torch.cuda.is_available()
    result = {}
    for name in ATTENTION_KERNELS:
        reason = dispatch.unavailable_reason(name, torch.device("cuda"))
        if reason and not dispatch.unavailable_reason(name, torch.device("cpu")):
            reason = ""
        detail = f"attention: {dispatch.KERNELS[name].summary}"
        choices = dispatch.explain(name, requested) if has_cuda and not reason else []
        if choices:
            detail += "; chosen " + ", ".join(choices)
        result[name] = Backend(not reason, ("cuda",) if choices else (), f"{detail}; {reason}" if reason else detail)
    return result


def _note(requested: str | None, found: Backends) -> str:
    if requested is None:
        return ""
    try:
        requested_backend(None)
    except ValueError as error:
        return f"{error}; every op without an argument backend= raises this"
    absent = {}
    for device in ("cpu", "cuda"):
        native = found[f"native-{device}"]
        reason = "" if native.available or requested == "reference" else native.detail
        if requested in ATTENTION_KERNELS:
            reason = dispatch.unavailable_reason(requested, torch.device(device)) or reason
        if reason:
            absent[device] = reason
    note = f"{VARIABLE}={requested} asks for {requested}{' attention' if requested in ATTENTION_KERNELS else ''}"
    if not absent:
        return note
    reasons = " and ".join(f"on {device} ({reason})" for device, reason in absent.items())
    return f"{note}, which cannot be had {reasons}; ops that need it raise there"


def _describe(device: str) -> str:
    info = library.build_info
    if device == "cuda":
        return f"compiled for {', '.join(info['cuda_architectures'])}"
    kernels = build.instruction_set() or "instruction set unknown"
    ignored = library.ignored_isa_reason()
    built = f"{kernels} kernels, compiled by {info.get('compiler')} against torch {info.get('torch')}"
    return f"{built}; {ignored}" if ignored else built
