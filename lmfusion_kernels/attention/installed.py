"""What is installed, and what can the device do? EngineRequest when a kernel is considered for the first time, never before."""

import importlib
import importlib.util
from importlib.metadata import PackageNotFoundError, version

import torch

from lmfusion_kernels.attention.interface import AttentionProblem, dtype_name
from lmfusion_kernels.runtime.device import capability


def has_module(name: str) -> bool:
    """Whether `import name` would find a module."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a parent package that is not there, or a module without a specification
        return False


def version_of(distribution: str) -> tuple[int, ...] | None:
    """The leading numbers of the installed version, (2, 8, 3); None if it is not installed."""
    try:
        text = version(distribution)
    except PackageNotFoundError:
        return None
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def why_no_import(module: str) -> str:
    """Why a package that is installed cannot be imported; empty if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a compiled module of another torch or CUDA may raise
        return f"`import {module}` fails ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    return ""


def why_not_device(device: torch.device, capabilities: str, fits: tuple[tuple[int, int], ...]) -> str:
    """Why a kernel for devices whose capability begins one of the ranges in `fits` cannot run on `device`.

    fits: (first, last) major versions. capabilities: the same in words, for the message.
    """
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    found = capability(device)
    if found is None:
        return "torch finds no CUDA device"
    if not any(first <= found[0] <= last for first, last in fits):
        return f"it needs compute capability {capabilities}, and this device has {found[0]}.{found[1]}"
    return ""


def why_not_flash(case: AttentionProblem, max_head_dim: int = 256) -> str:
    """Limits common to all FlashAttention kernels: half precision, head sizes that are multiples of 8."""
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {dtype_name(case.dtype)}"
    if case.head_dim % 8 or not 0 < case.head_dim <= max_head_dim:
        return f"it takes head sizes that are multiples of 8 up to {max_head_dim}, not {case.head_dim}"
    return ""


def wants_deterministic() -> bool:
    """Whether torch.use_deterministic_algorithms(True) holds, and not to warn alone."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
