"""Compiles Triton kernels without a GPU, exactly as they would be launched on one.

The project's own launching code runs on tensors that have shapes and a device but no memory; the kernels that it
launches are compiled for one architecture and not run. As a program: an architecture (80, 90) and a JSON list of cases
in; triton's version and a list of reports out.

It runs in its own process, because the tests' process may have imported triton for its interpreter.
"""

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from tests.kernels.compile import cuobjdump, proxy_fences  # noqa: E402

PROPERTIES = {
    80: SimpleNamespace(major=8, minor=0, multi_processor_count=108, L2_cache_size=40 << 20),
    90: SimpleNamespace(major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20),
}


@dataclass
class Report:
    """The result of compiling one launch of a case."""

    kernel: str
    num_warps: int
    registers: int
    stack: int
    """Bytes of local memory per thread: spilled registers."""
    shared: int
    """Bytes per block, static and dynamic."""
    num_dots: int
    """Matrix products in the kernel before lowering."""
    is_serialized: bool
    """Whether ptxas makes every wgmma wait for the previous one, which halves the rate."""
    unfenced: list[dict[str, str]] = field(default_factory=list)
    """Reads and writes of shared memory with a missing fence between them; see proxy_fences."""
    instructions: dict[str, int] = field(default_factory=dict)


class CompileOnlyDriver:
    """A GPU of this architecture, as far as triton queries it before a launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def compile_only(capability: int) -> Iterator[list[Any]]:
    """Tensors on "cuda" can be created without memory; kernels launched on them are compiled and added to the list."""
    compiled: list[Any] = []
    run = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert len(grid) <= 3 and all(size > 0 for size in grid), f"{self.__name__} is launched with grid {grid}"
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    triton.runtime.driver.set_active(CompileOnlyDriver(capability))
    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch("torch.cuda.get_device_capability", return_value=divmod(capability, 10)),
        mock.patch("torch.cuda.get_device_properties", return_value=PROPERTIES[capability]),
        mock.patch("torch.cuda.device", return_value=nullcontext()),
        mock.patch("torch.cuda.device_of", return_value=nullcontext()),
        FakeTensorMode(),
    ):
        yield compiled


def report(kernel: Any) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        (found,) = cuobjdump.kernels(Path(file.name))
    return Report(
        kernel=kernel.metadata.name,
        num_warps=kernel.metadata.num_warps,
        registers=found.registers,
        stack=found.stack,
        shared=max(kernel.metadata.shared, found.shared),
        num_dots=kernel.asm["ttir"].count("tt.dot "),
        is_serialized="wgmma" in kernel.asm["ptx"] and "wgmma.mma_async instructions are serialized" in advice(kernel),
        unfenced=[asdict(pair) for pair in proxy_fences.unfenced_reads(kernel.asm["ptx"])],
        instructions=dict(found.instructions),
    )


def advice(kernel: Any) -> str:
    """The messages of ptxas when it assembles a kernel for sm_90a."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(kernel.asm["ptx"])
        command = [
            get_ptxas(90).path,
            "--verbose",
            "--gpu-name=sm_90a",
            ptx,
            "--output-file",
            ptx.with_suffix(".cubin"),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


# ---- Cases -----------------------------------------------------------------------------------------------------------


def gate_up_swiglu(dtype: torch.dtype, keep: bool) -> None:
    """Both towers of LMFusion-8B."""
    from lmfusion_kernels.triton import gate_up_swiglu

    x = [torch.empty(4096, 4096, dtype=dtype, device="cuda") for _ in range(2)]
    weights = [torch.empty(2 * 14336, 4096, dtype=dtype, device="cuda") for _ in range(2)]
    gate_up_swiglu.forward(x, weights, num_constant=0, keep=keep)


def attention(
    dtype: torch.dtype,
    head_dim: int,
    backward: bool,
    num_queries: int = 8192,
    num_keys: int = 8192,
    hidden: bool = False,
) -> None:
    """LMFusion-8B's heads, results in tower order; with few queries, those of generation with a cache."""
    from lmfusion_kernels.triton import hybrid_attention

    def indices(count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.int32, device="cuda")

    q = torch.empty(num_queries, 32, head_dim, dtype=dtype, device="cuda")
    k, v = (torch.empty(num_keys, 8, head_dim, dtype=dtype, device="cuda") for _ in range(2))
    ranges, out_row, scale = (indices(num_queries), indices(num_queries)), indices(num_queries), head_dim**-0.5
    ends = (indices(num_keys), indices(num_keys)) if hidden else (None, None)
    if not backward:
        hybrid_attention.forward(q, k, v, *ranges, out_row, scale, *ends)
        return
    lse = torch.empty(32, num_queries, dtype=torch.float32, device="cuda")
    by_key = (indices(num_keys), indices(num_keys), indices(num_keys))
    hybrid_attention.backward(q, q, k, v, q, lse, *ranges, *by_key, out_row, scale, *ends)


CASES = {"gate_up_swiglu": gate_up_swiglu, "attention": attention}


def main() -> None:
    capability, cases = int(sys.argv[1]), json.loads(sys.argv[2])
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    reports = []
    for case in cases:
        arguments = case["arguments"] | {"dtype": getattr(torch, case["arguments"]["dtype"])}
        with compile_only(capability) as compiled:
            CASES[case["launch"]](**arguments)
        reports.append([asdict(report(kernel)) for kernel in compiled])
    print(json.dumps([triton.__version__, reports]))


if __name__ == "__main__":
    main()
