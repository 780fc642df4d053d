"""Policy: whether an op runs as a compiled op ("native") or in plain PyTorch ("reference").

The argument `backend=` decides; without it the environment variable LMFUSION_KERNELS_BACKEND; without both, native
wherever it can run. The name of an attention kernel (lmfusion_kernels.attention) means the native ops with that kernel.
"""

import os
from collections.abc import Iterable

import torch
from torch import Tensor

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
    requested = backend or os.environ.get(VARIABLE) or None
    if requested is not None and requested not in BACKENDS:
        source = "backend" if backend else VARIABLE
        raise ValueError(f"{source}={requested!r} is unknown; known: {', '.join(BACKENDS)}")
    return requested


def choose_backend(backend: str | None, *tensors: Tensor | None, others: Iterable[Tensor | None] = ()) -> str:
    """The backend that an op without attention on `tensors` runs with: "native" or "reference".

    others: its other arguments, whose dtype and device are checked elsewhere. Raises ValueError for an unknown backend,
    and where native ops are requested and cannot run; RuntimeError for a forward-mode derivative of native ops.
    """
    requested = requested_backend(backend)
    if requested == "reference":
        return "reference"
    reason = native_unsupported_reason(*tensors)
    if not reason:
        everything = (*tensors, *others)
        refuse_forward_mode(everything)
        if not is_transformed(everything):
            return "native"
        reason = INSIDE_TRANSFORM
    if requested is not None:
        raise ValueError(f"the native backend was asked for, but {reason}; {REFERENCE_RUNS}")
    return "reference"


def native_unsupported_reason(*tensors: Tensor | None) -> str:
    """Why the native ops cannot run on `tensors`, as the rest of a sentence; empty if they can."""
    if not library.native:
        return library.unavailable_reason
    for tensor in tensors:
        if tensor is None:
            continue
        if reason := native_unavailable_reason(tensor.device):
            return reason
        dtypes = NATIVE_DTYPES[tensor.device.type]
        if tensor.is_floating_point() and tensor.dtype not in dtypes:
            names = [str(dtype).removeprefix("torch.") for dtype in (*dtypes, tensor.dtype)]
            return f"it takes {', '.join(names[:-2])} and {names[-2]} on {tensor.device.type}, not {names[-1]}"
    return ""


def native_unavailable_reason(device: torch.device) -> str:
    """Why the library, which loads, has nothing for `device`; empty if it has."""
    if device.type in ("cpu", "meta"):
        return ""
    if device.type != "cuda":
        return f"it runs on cpu and cuda, not on {device.type}"
    architectures = library.build_info.get("cuda_architectures")
    if not architectures:
        return library.build_info["cuda_unavailable_reason"]
    return _uncompiled_reason(tuple(architectures), device)


@constant_result
def _uncompiled_reason(architectures: tuple[str, ...], device: torch.device) -> str:
    found = capability(device)
    if found is None or runs_on(architectures, found):  # None: fake tensors on a machine without the device
        return ""
    return (
        f"the device has compute capability {found[0]}.{found[1]} and the library was compiled for "
        f"{', '.join(architectures)}; set LMFUSION_CUDA_ARCHITECTURES={found[0]}{found[1]} and build it again"
    )
