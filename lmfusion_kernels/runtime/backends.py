"""Which implementation of an op runs: the compiled ops ("native"), or plain PyTorch ("reference")?

An argument `backend=` decides; without it the environment variable LMFUSION_KERNELS_BACKEND; without that, native
wherever it can run. The name of an attention kernel (lmfusion_kernels.attention) means the native ops with that kernel.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmfusion_kernels.layout import build
from lmfusion_kernels.runtime import library
from lmfusion_kernels.runtime.device import capability, constant_result, runs_on
from lmfusion_kernels.runtime.transforms import INSIDE_TRANSFORM, is_transformed, refuse_forward_mode

ATTENTION_KERNELS = ("triton", "flash", "flash-attn-2", "flash-attn-3", "flash-attn-4", "flex")
BACKENDS = ("native", "reference", *ATTENTION_KERNELS)
VARIABLE = "LMFUSION_KERNELS_BACKEND"
REFERENCE_RUNS = "backend='reference' runs everywhere"
NATIVE_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "meta": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def requested_backend(backend: str | None) -> str | None:
    """The backend that the argument or else the environment names; None if neither does.

    Raises ValueError for an unknown name.
    """
    asked = backend or os.environ.get(VARIABLE) or None
    if asked is not None and asked not in BACKENDS:
        source = "backend" if backend else VARIABLE
        raise ValueError(f"{source}={asked!r} is unknown; known: {', '.join(BACKENDS)}")
    return asked


def choose(backend: str | None, *tensors: Tensor | None, others: Iterable[Tensor | None] = ()) -> str:
    """The backend that an op without attention on `tensors` runs with: "native" or "reference".

    others: its other arguments, whose dtype and device are checked elsewhere. Raises ValueError for an unknown backend,
    and where native ops are asked for and cannot run; RuntimeError for a forward-mode derivative of native ops.
    """
    asked = requested_backend(backend)
    if asked == "reference":
        return "reference"
    reason = why_not_native(*tensors)
    if not reason:
        everything = (*tensors, *others)
        refuse_forward_mode(everything)
        if not is_transformed(everything):
            return "native"
        reason = INSIDE_TRANSFORM
    if asked is not None:
        raise ValueError(f"the native backend was asked for, but {reason}; {REFERENCE_RUNS}")
    return "reference"


def why_not_native(*tensors: Tensor | None) -> str:
    """Why the native ops cannot run on `tensors`, as the rest of a sentence; empty if they can."""
    if not library.native:
        return library.unavailable_reason
    for tensor in tensors:
        if tensor is None:
            continue
        if reason := _why_not_device(tensor.device):
            return reason
        dtypes = NATIVE_DTYPES[tensor.device.type]
        if tensor.is_floating_point() and tensor.dtype not in dtypes:
            names = [str(dtype).removeprefix("torch.") for dtype in (*dtypes, tensor.dtype)]
            return f"it takes {', '.join(names[:-2])} and {names[-2]} on {tensor.device.type}, not {names[-1]}"
    return ""


def _why_not_device(device: torch.device) -> str:
    if device.type in ("cpu", "meta"):
        return ""
    if device.type != "cuda":
        return f"it runs on cpu and cuda, not on {device.type}"
    architectures = library.build_info.get("cuda_architectures")
    if not architectures:
        return library.build_info["cuda_unavailable_reason"]
    return _why_not_capability(tuple(architectures), device)


@constant_result
def _why_not_capability(architectures: tuple[str, ...], device: torch.device) -> str:
    found = capability(device)
    if found is None or runs_on(architectures, found):  # None: fake tensors on a machine without the device
        return ""
    return (
        f"the device has compute capability {found[0]}.{found[1]} and the library was compiled for "
        f"{', '.join(architectures)}; set LMFUSION_CUDA_ARCHITECTURES={found[0]}{found[1]} and build it again"
    )


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

    note = ""
    """What LMFUSION_KERNELS_BACKEND asks for, and where that cannot be had; empty if it is not set."""

    def __repr__(self) -> str:
        lines = [f"lmfusion_kernels with torch {torch.__version__}:"]
        for name, backend in self.items():
            chosen = "chosen for " + ", ".join(backend.chosen_for) if backend.chosen_for else "available"
            lines.append(f"  {name:12} {chosen if backend.available else 'not here':21} {backend.detail}")
        return "\n".join([*lines, self.note] if self.note else lines)


def backends() -> Backends:
    """What is available here, what is chosen, and why not the rest.

    First the ops without attention, by device; then the kernels of attention (on the CPU native-cpu has one too); last
    the reference. `chosen_for` speaks of float32 and bfloat16 tensors, `note` of LMFUSION_KERNELS_BACKEND: whatever
    that names, this does not raise.
    """
    asked = os.environ.get(VARIABLE) or None
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    result = Backends()
    for device in ("cpu", "cuda"):
        where = torch.device("cuda", torch.cuda.current_device()) if device in devices[1:] else torch.device(device)
        reason = library.unavailable_reason or _why_not_device(where)
        if not reason and device not in devices:
            reason = "torch finds no CUDA device"
        is_chosen = not reason and asked in (None, "native", *ATTENTION_KERNELS)
        result[f"native-{device}"] = Backend(not reason, (device,) if is_chosen else (), reason or _describe(device))
    result.update(_attention_kernels(asked))
    rest: tuple[str, ...] = ()
    if asked in (None, "reference"):
        rest = tuple(device for device in devices if not result[f"native-{device}"].chosen_for)
    result["reference"] = Backend(True, rest, "plain PyTorch, every dtype and device; also for what nothing else takes")
    result.note = _note(asked, result)
    return result


def _attention_kernels(asked: str | None) -> dict[str, Backend]:
    """The kernels of attention on CUDA devices; FlexAttention also runs on the CPU, to be compared."""
    from lmfusion_kernels import attention

    has_cuda = torch.cuda.is_available()
    result = {}
    for name in ATTENTION_KERNELS:
        reason = attention.unavailable_reason(name, torch.device("cuda"))
        if reason and not attention.unavailable_reason(name, torch.device("cpu")):
            reason = ""
        detail = f"attention: {attention.KERNELS[name].summary}"
        choices = attention.explain(name, asked) if has_cuda and not reason else []
        if choices:
            detail += "; chosen " + ", ".join(choices)
        result[name] = Backend(not reason, ("cuda",) if choices else (), f"{detail}; {reason}" if reason else detail)
    return result


def _note(asked: str | None, found: Backends) -> str:
    if asked is None:
        return ""
    try:
        requested_backend(None)
    except ValueError as error:
        return f"{error}; every op without an argument backend= raises this"
    from lmfusion_kernels import attention

    absent = {}
    for device in ("cpu", "cuda"):
        native = found[f"native-{device}"]
        reason = "" if native.available or asked == "reference" else native.detail
        if asked in ATTENTION_KERNELS:
            reason = attention.unavailable_reason(asked, torch.device(device)) or reason
        if reason:
            absent[device] = reason
    note = f"{VARIABLE}={asked} asks for {asked}{' attention' if asked in ATTENTION_KERNELS else ''}"
    if not absent:
        return note
    reasons = " and ".join(f"on {device} ({reason})" for device, reason in absent.items())
    return f"{note}, which cannot be had {reasons}; ops that need it raise there"


def _describe(device: str) -> str:
    info = library.build_info
    if device == "cuda":
        return f"compiled for {', '.join(info['cuda_architectures'])}"
    kernels = build.instruction_set() or "instruction set unknown"
    ignored = library.why_isa_is_ignored()
    built = f"{kernels} kernels, compiled by {info.get('compiler')} against torch {info.get('torch')}"
    return f"{built}; {ignored}" if ignored else built
