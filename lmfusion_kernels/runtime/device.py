"""The compute capability of a CUDA device, and whether code compiled for certain architectures runs on it."""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def constant_result(function: F) -> F:
    """Let torch.compile call `function` while it traces and treat the answer as a constant.

    torch.compiler.assume_constant_result does the same, and imports the compiler to do so.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_result
def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device; None if torch finds no CUDA device."""
    return _capability(device)


@lru_cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


@lru_cache
def runs_on(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures (CMake's names: "80-real", "90a", "90-virtual") runs on such a device.

    Machine code ("real") runs from its own minor version to the end of its major version, PTX ("virtual") from its
    version on. A name that ends in a letter runs on exactly one version; a name without either word stands for both.
    """
    for name in architectures:
        match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", name)
        if match is None:
            continue
        version = (int(match[1]), int(match[2]))
        is_exact, is_real = bool(match[3]), match[4] == "-real"
        if version == capability:
            return True
        if version < capability and not is_exact and (not is_real or version[0] == capability[0]):
            return True
    return False
