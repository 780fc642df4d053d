"""Which implementation of an op runs: the compiled ops ("native"), or plain PyTorch ("reference")?

An argument `backend=` decides; without it the environment variable LMFUSION_KERNELS_BACKEND; without that, native
wherever it can run.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from lmfusion_kernels import _host, _library

BACKENDS = ("native", "reference")
NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def choose(backend: str | None, *tensors: Tensor | None) -> str:
    """The backend that an op on `tensors` runs with: "native" or "reference".

    Raises ValueError for an unknown backend, and where "native" is asked for and cannot run.
    """
    asked = backend or os.environ.get("LMFUSION_KERNELS_BACKEND") or None
    if asked is not None and asked not in BACKENDS:
        source = "backend" if backend else "LMFUSION_KERNELS_BACKEND"
        raise ValueError(f"{source}={asked!r} is unknown; known: {', '.join(BACKENDS)}")
    if asked == "reference":
        return "reference"
    reason = why_not_native(*tensors)
    if not reason:
        return "native"
    if asked == "native":
        raise ValueError(f"the native backend was asked for, but {reason}; backend='reference' runs everywhere")
    return "reference"


def why_not_native(*tensors: Tensor | None) -> str:
    """Why the native ops cannot run on `tensors`, as the rest of a sentence; empty if they can."""
    if not _library.native:
        return _library.why_not
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.is_floating_point() and tensor.dtype not in NATIVE_DTYPES:
            return f"it takes float32 and bfloat16, not {str(tensor.dtype).removeprefix('torch.')}"
        if reason := _why_not_device(tensor.device.type):
            return reason
    return ""


def _why_not_device(device_type: str) -> str:
    if device_type in ("cpu", "meta"):
        return ""
    if device_type == "cuda":
        return "" if _library.build_info.get("cuda_architectures") else _library.build_info["cuda_why_not"]
    return f"it runs on cpu and cuda, not on {device_type}"


@dataclass(frozen=True)
class Backend:
    """One line of `backends()`."""

    available: bool
    chosen_for: tuple[str, ...]
    """Device types whose tensors it gets when nobody asks for a backend."""
    detail: str
    """What it is, or why it is not available."""


class Backends(dict[str, Backend]):
    """The backends by name; prints as a table."""

    def __repr__(self) -> str:
        lines = [f"lmfusion_kernels with torch {torch.__version__}:"]
        for name, backend in self.items():
            chosen = "chosen for " + ", ".join(backend.chosen_for) if backend.chosen_for else "available"
            lines.append(f"  {name:12} {chosen if backend.available else 'not here':21} {backend.detail}")
        return "\n".join(lines)


def backends() -> Backends:
    """What is available here, what is chosen (for float32 and bfloat16 tensors), and why not the rest."""
    asked = choose(os.environ.get("LMFUSION_KERNELS_BACKEND"))
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    result = Backends()
    for device in ("cpu", "cuda"):
        reason = _library.why_not or _why_not_device(device)
        if not reason and device not in devices:
            reason = "torch finds no CUDA device"
        is_chosen = not reason and asked == "native"
        result[f"native-{device}"] = Backend(not reason, (device,) if is_chosen else (), reason or _describe(device))
    rest = tuple(device for device in devices if not result[f"native-{device}"].chosen_for)
    result["reference"] = Backend(True, rest, "plain PyTorch, every dtype and device; also for float64 and float16")
    return result


def _describe(device: str) -> str:
    info = _library.build_info
    if device == "cuda":
        return f"compiled for {', '.join(info['cuda_architectures'])}"
    kernels = _host.instruction_set() or "instruction set unknown"
    return f"{kernels} kernels, compiled by {info.get('compiler')} against torch {info.get('torch')}"
