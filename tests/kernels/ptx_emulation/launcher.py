"""Runs the project's Triton kernels, compiled for a GPU, on tensors in the memory of the CPU.

`emulate(capability)` replaces Triton's launch: the project's own launching code runs unchanged, each kernel is compiled
for that architecture, and its PTX is emulated on the arguments.

    with emulate(90) as emulation:
        out, lse = hybrid_attention.forward(q, k, v, ...)      # CPU tensors, bfloat16 or float16
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.kernels.compile.triton_compiler import PROPERTIES, CompileOnlyDriver
from tests.kernels.ptx_emulation.block import Schedule, launch
from tests.kernels.ptx_emulation.memory import PARAMETER_BASE, GlobalMemory, TensorMap
from tests.kernels.ptx_emulation.parser import Kernel, parse
from tests.kernels.ptx_emulation.values import EmulationError


@dataclass
class Emulation:
    """What was launched, and how the next launch is run."""

    schedule: Schedule = field(default_factory=Schedule)
    change: Callable[[str, str], str] | None = None
    """Changes (kernel's name, PTX) to other PTX before it runs, to see whether a fault is noticed."""
    read_only: tuple[str, ...] = ()
    """Names of kernel parameters that no kernel may write."""
    launched: list[str] = field(default_factory=list)
    num_steps: int = 0


@contextmanager
def emulate(capability: int, emulation: Emulation | None = None) -> Iterator[Emulation]:
    emulation = emulation or Emulation()
    run = JITFunction.run

    def run_emulated(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if compiled.metadata.target.arch != capability:  # Triton keeps what it compiled first in a process
            raise EmulationError(f"the kernel was compiled for sm_{compiled.metadata.target.arch}, not sm_{capability}")
        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        _run(emulation, compiled, values, (*grid, 1, 1)[:3])

    triton.runtime.driver.set_active(CompileOnlyDriver(capability))
    from lmfusion_kernels.triton import hybrid_attention, hybrid_attention_arguments
    from lmfusion_kernels.triton.hybrid_attention_configurations import configurations

    def configurations_of(q: torch.Tensor) -> Any:
        return configurations(q.shape[2], q.element_size(), divmod(capability, 10))

    with (
        mock.patch.object(JITFunction, "run", run_emulated),
        mock.patch("torch.cuda.get_device_capability", return_value=divmod(capability, 10)),
        mock.patch("torch.cuda.get_device_properties", return_value=PROPERTIES[capability]),
        mock.patch("torch.cuda.device_of", return_value=nullcontext()),
        mock.patch("torch.cuda.device", return_value=nullcontext()),
        # The launching code takes tensors on the CPU where the kernels are interpreted; here they are emulated.
        mock.patch.object(hybrid_attention_arguments, "INTERPRETED", True),
        mock.patch.object(hybrid_attention, "default_configurations", configurations_of),
    ):
        yield emulation


def _run(emulation: Emulation, compiled: Any, values: dict[str, Any], grid: tuple[int, int, int]) -> None:
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    if emulation.change is not None:
        ptx = emulation.change(metadata.name, ptx)
    kernel = parse(ptx)
    arguments = Arguments(kernel, emulation.read_only)
    descriptors = iter(getattr(metadata, "tensordesc_meta", None) or ())
    for name, kind in compiled.src.signature.items():
        if kind != "constexpr":
            arguments.add(name, kind, values[name], descriptors)
    emulation.launched.append(metadata.name)
    num_threads = kernel.num_threads or 32 * metadata.num_warps
    emulation.num_steps += launch(
        kernel,
        grid,
        bytes(arguments.space),
        arguments.memory,
        arguments.tensor_maps,
        num_threads,
        metadata.shared,
        emulation.schedule,
    )


class Arguments:
    """The parameter space of a launch, filled in the order of the kernel's parameters."""

    def __init__(self, kernel: Kernel, read_only: tuple[str, ...] = ()) -> None:
        self.space = bytearray(kernel.parameter_bytes)
        self.memory = GlobalMemory()
        self.tensor_maps: dict[int, TensorMap] = {}
        self._parameters = iter(kernel.parameters.values())
        self._addresses: dict[tuple[int, int], int] = {}
        self._read_only = read_only

    def add(self, name: str, kind: str, value: Any, descriptors: Iterator[dict[str, Any]]) -> None:
        """One argument of type `kind` in Triton's signature; a descriptor takes several parameters."""
        if isinstance(value, TensorDescriptor):
            self._add_descriptor(name, value, next(descriptors))
        elif isinstance(value, torch.Tensor):
            self._put(np.uint64(self._address(name, value)))
        elif kind.startswith("fp"):
            self._put(np.float32(value))
        else:
            self._put(np.int64(value))

    def _add_descriptor(self, name: str, value: TensorDescriptor, metadata: dict[str, Any]) -> None:
        size = value.base.element_size()
        parameter = next(self._parameters)
        self.tensor_maps[PARAMETER_BASE + parameter.offset] = TensorMap(
            base=self._address(name, value.base),
            element_size=size,
            sizes=tuple(value.shape[::-1]),
            strides=tuple(stride * size for stride in value.strides[-2::-1]),
            box=tuple(metadata["block_size"][::-1]),
            swizzle=metadata["swizzle"],
        )
        for number in (*value.shape, *value.strides):
            self._put(np.int64(number))

    def _put(self, value: Any) -> None:
        parameter = next(self._parameters)
        self.space[parameter.offset : parameter.offset + parameter.size] = value.tobytes()[: parameter.size]

    def _address(self, name: str, tensor: torch.Tensor) -> int:
        """Where the tensor is in the emulated memory; equal tensors are at one address."""
        data = _bytes_of(tensor)
        key = (data.ctypes.data, data.size)
        if key not in self._addresses:
            self._addresses[key] = self.memory.add(data, name, name not in self._read_only)
        return self._addresses[key]


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """uint8 view of all that lies between the first and the last element of a tensor."""
    if tensor.device.type != "cpu":
        raise EmulationError(f"tensors must be on the CPU, got {tensor.device}")
    count = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.detach().as_strided((count if tensor.numel() else 0,), (1,))
    return flat.view(torch.uint8).numpy()
