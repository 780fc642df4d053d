"""What is installed and what the device can do, looked up when a kernel is first considered for a call."""

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
    except (ImportError, ValueError):  # a parent package that is missing, or a module without a specification
        return False


def installed_version(distribution: str) -> tuple[int, ...] | None:
    """The leading numbers of the installed version, (2, 8, 3); None if it is not installed."""
    try:
        text = version(distribution)
    except PackageNotFoundError:
        return None
    numbers = []
    for piece in text.split("."):
        if not piece.isdigit():
            break
        numbers.append(int(piece))
    return tuple(numbers)


def import_failure(module: str) -> str:
    """Why a package that is installed cannot be imported; empty if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a module compiled for another torch or CUDA may raise anything
        return f"`import {module}` fails ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    return ""


def unsupported_device(device: torch.device, capabilities: str, ranges: tuple[tuple[int, int], ...]) -> str:
    """Why a kernel for certain compute capabilities cannot run on `device`; empty if it can.

    ranges: (first, last) major versions. capabilities: the same in words, for the message.
    """
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    found = capability(device)
    if found is None:
        return "torch finds no CUDA device"
    if not any(first <= found[0] <= last for first, last in ranges):
        return f"it needs compute capability {capabilities}, and this device has {found[0]}.{found[1]}"
    return ""


def unsupported_by_flash(problem: AttentionProblem, max_head_dim: int = 256) -> str:
    """Why FlashAttention cannot run `problem`: it takes half precision and head sizes that are multiples of 8."""
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {dtype_name(problem.dtype)}"
    if problem.head_dim % 8 or not 0 < problem.head_dim <= max_head_dim:
        return f"it takes head sizes that are multiples of 8 up to {max_head_dim}, not {problem.head_dim}"
    return ""


def wants_deterministic() -> bool:
    """Whether torch.use_deterministic_algorithms(True) is set, and not with warn_only."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
