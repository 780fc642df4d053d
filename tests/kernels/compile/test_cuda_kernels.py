"""nvcc compiles csrc/cuda as memory-bound kernels need it: no spills, few registers, accesses of 16 bytes."""

import re
import sys
from pathlib import Path

import pytest
import torch

from lmfusion_kernels.runtime import library
from tests.kernels.compile import cuobjdump

ROOT = Path(__file__).resolve().parents[3]
LARGEST_SHARED = 48 * 1024  # the default limit of a block

# 64 registers: half of the threads that a multiprocessor can hold; 80: three blocks of 256. Memory-bound kernels need
# many bytes in flight: the number of threads times the bytes that each loads before it uses them.
REGISTERS = {
    "reorder_rows_kernel": 40,
    "rms_norm_kernel": 64,
    "rms_norm_any_kernel": 40,
    "rms_norm_backward_kernel": 80,
    "rms_norm_backward_any_kernel": 40,
    "rope_reorder_kernel": 80,
    "rope_reorder_any_kernel": 64,
    "rope_backward_kernel": 64,
    "rope_norm_backward_kernel": 80,
    "rope_backward_any_kernel": 64,
    "sum_partials_kernel": 32,
    "swiglu_kernel": 64,
    "swiglu_backward_kernel": 72,
}
"""The most registers a thread may have, by kernel."""
NARROW_LOADS = 3
"""Loads of one number per row or group of heads: its index, its rstd."""
NARROW_STORES = {"rms_norm_kernel": 1, "rope_norm_backward_kernel": 6}
"""Stores of less than 16 bytes: rstd, and a block's sums of the gradients of a norm."""


def library_path() -> Path:
    found = sorted((ROOT / "lmfusion_kernels").glob("_C*.so"))
    if not found:
        pytest.skip(library.unavailable_reason)
    if not library.build_info.get("cuda_architectures"):
        pytest.skip(f"the library has no CUDA kernels: {library.build_info.get('cuda_unavailable_reason')}")
    return found[0]


@pytest.fixture(scope="module")
def kernels() -> list[cuobjdump.Kernel]:
    path = library_path()
    if cuobjdump.find() is None:
        pytest.skip("there is no cuobjdump: it comes with triton and with CUDA")
    return cuobjdump.kernels(path)


def defined_in_source() -> set[str]:
    text = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu*"))
    return set(re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^()]*\)\s*)?(\w+)\(", text))


def is_vector(kernel: cuobjdump.Kernel) -> bool:
    """Whether the kernel is for rows that can be read 16 bytes at a time. The others are for rows without alignment."""
    if kernel.name.startswith("swiglu"):
        return "Li1E" not in kernel.symbol
    if kernel.name == "reorder_rows_kernel":
        return "uint4" in kernel.symbol
    return kernel.name != "sum_partials_kernel" and not kernel.name.endswith("_any_kernel")


def test_no_kernel_escapes(kernels):
    assert {kernel.name for kernel in kernels} == defined_in_source() == set(REGISTERS)


def test_machine_code_for_every_architecture_and_ptx_for_later_ones(kernels):
    names = library.build_info["cuda_architectures"]
    assert names and all(re.fullmatch(r"\d+[af]?-(real|virtual)", name) for name in names)
    real = {f"sm_{name.split('-')[0]}" for name in names if name.endswith("-real")}
    virtual = {f"sm_{name.split('-')[0]}" for name in names if name.endswith("-virtual")}
    assert {k.architecture for k in kernels} == real
    for architecture in real:
        assert {k.symbol for k in kernels if k.architecture == architecture} == {k.symbol for k in kernels}
    assert cuobjdump.ptx_architectures(library_path()) == virtual


def test_no_local_memory(kernels):
    assert {(k.architecture, k.symbol): k.stack for k in kernels if k.stack or k.local_accesses} == {}


def test_registers_and_shared_memory(kernels):
    assert {k.symbol: k.registers for k in kernels if k.registers > REGISTERS[k.name]} == {}
    assert {k.symbol: k.shared for k in kernels if k.shared > LARGEST_SHARED} == {}


def test_rows_come_and_go_in_accesses_of_16_bytes(kernels):
    vector = [kernel for kernel in kernels if is_vector(kernel)]
    assert {k.name for k in vector} == {n for n in REGISTERS if not n.endswith("_any_kernel")} - {"sum_partials_kernel"}
    for kernel in vector:
        loads, stores = kernel.count("LDG", "128"), kernel.count("STG", "128")
        assert loads > 0 and stores > 0, kernel.symbol
        assert kernel.count("LDG") - loads <= NARROW_LOADS, kernel.symbol
        assert kernel.count("STG") - stores <= NARROW_STORES.get(kernel.name, 0), kernel.symbol


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_loads_on_a_torch_without_cuda():
    """Loaded in this process: it has CUDA kernels, but needs no library of CUDA."""
    path = library_path()
    assert library.native, library.unavailable_reason
    maps = Path("/proc/self/maps").read_text()
    assert str(path) in maps
    assert not re.findall(r"lib(?:cuda|cudart|torch_cuda|c10_cuda)\.so\S*", maps)


def implemented(folder: Path, pattern: str) -> set[str]:
    return {name for path in folder.glob(pattern) for name in re.findall(r'm\.impl\("(\w+)"', path.read_text())}


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not a checkout")
def test_what_the_cpu_has_the_gpu_has_too():
    on_cpu, on_gpu = implemented(ROOT / "csrc" / "cpu", "*_op.cpp"), implemented(ROOT / "csrc" / "cuda", "*.cu")
    assert on_cpu - on_gpu == {"hybrid_attention", "hybrid_attention_backward"}, "those are Triton's on the GPU"
    assert on_gpu <= on_cpu


def test_ops_are_registered_for_cuda():
    library_path()
    for name in implemented(ROOT / "csrc" / "cuda", "*.cu"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lmfusion::{name}", "CUDA"), name
