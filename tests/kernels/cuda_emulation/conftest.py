"""The emulated CUDA ops: built once, loaded as torch.ops.lmfusion_emulated, switched on for one test at a time."""

import ctypes
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lmfusion_kernels.runtime import library
from tests.kernels.cuda_emulation import build

OPS = ("rms_norm", "rope_reorder", "swiglu", "reorder_rows")
# import_module, because the package has functions of the same names.
MODULES = {name: importlib.import_module(f"lmfusion_kernels.ops.{name}") for name in OPS}
"""The ops with a gradient, and the modules that have their wrappers and autograd formulas."""
backends = importlib.import_module("lmfusion_kernels.runtime.backends")


class Emulation:
    """The controls and reports of the emulation while it is switched on."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        for name in ("launched", "host_error"):
            getattr(library, f"lmf_emulation_{name}").restype = ctypes.c_char_p

    def switch(self, on: bool) -> None:
        self.library.lmf_emulation_switch(int(on))

    def seed(self, seed: int) -> None:
        """Set the order in which blocks and threads run from now on."""
        self.library.lmf_emulation_seed(seed)

    def launched(self) -> list[str]:
        """Names of the kernels launched since the last call, without template arguments."""
        return [name.strip("()").split("<")[0] for name in self.library.lmf_emulation_launched().decode().splitlines()]

    def set_num_multiprocessors(self, count: int) -> None:
        self.library.lmf_emulation_set_num_multiprocessors(ctypes.c_int64(count))

    def host_error(self) -> str:
        """The error of host code since the last call; "" if there is none."""
        return self.library.lmf_emulation_host_error().decode()


@pytest.fixture(scope="session")
def emulated_library() -> Emulation:
    if reason := build.unavailable_reason():
        pytest.skip(reason)
    path = str(build.library())
    torch.ops.load_library(path)
    for name, module in MODULES.items():
        torch.library.register_autograd(
            f"lmfusion_emulated::{name}", module._backward, setup_context=module._setup_context
        )
    return Emulation(ctypes.CDLL(path))


@pytest.fixture
def emulation(emulated_library: Emulation) -> Iterator[Emulation]:
    """Tensors made in the test count as device memory, which host code must not access."""
    emulated_library.switch(True)
    emulated_library.seed(0)
    emulated_library.launched()
    emulated_library.host_error()
    emulated_library.set_num_multiprocessors(2)
    try:
        yield emulated_library
    finally:
        emulated_library.switch(False)
    assert emulated_library.host_error() == ""


class OpsOnDevice:
    """torch.ops.lmfusion with the ops of csrc/cuda emulated, and the others (attention, linear) as on the CPU."""

    def __getattr__(self, name: str) -> Any:
        emulated = f"lmfusion_emulated::{name}"
        is_there = hasattr(torch.ops.lmfusion_emulated, name)  # schemas.cpp declares all ops; csrc/cuda has only some
        if is_there and torch._C._dispatch_has_kernel_for_dispatch_key(emulated, "CPU"):
            return getattr(torch.ops.lmfusion_emulated, name)
        return getattr(torch.ops.lmfusion, name)


@pytest.fixture
def cuda_ops(emulation: Emulation, monkeypatch: pytest.MonkeyPatch) -> Emulation:
    """All of lmfusion_kernels calls the emulated CUDA ops as its native backend, with CUDA's dtypes."""
    if not library.native:
        pytest.skip(library.unavailable_reason)
    for name, module in list(sys.modules.items()):
        if name.startswith("lmfusion_kernels.") and getattr(module, "_ops", None) is torch.ops.lmfusion:
            monkeypatch.setattr(module, "_ops", OpsOnDevice())
    monkeypatch.setitem(backends.NATIVE_DTYPES, "cpu", backends.NATIVE_DTYPES["cuda"])
    return emulation
