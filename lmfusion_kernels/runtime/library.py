"""Loads the compiled library of torch ops, once. `unavailable_reason` says in one sentence what is missing and what to
do; it is empty if the ops are there."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

MINIMUM_TORCH = (2, 10)
INSTRUCTION_SETS = ("baseline", "avx2")
"""The values of LMFUSION_CPU_ISA, which limits the CPU kernels to an instruction set (csrc/cpu/isa.h)."""
INSTALL_AGAIN = "`python setup.py build_ext --inplace` in the checkout, or install it again"


def read_build_info(folder: Path) -> dict[str, Any]:
    """What the build wrote about itself (`_build.json`).

    Keys: torch, compiler, cuda_architectures, cuda_unavailable_reason, unavailable_reason.
    """
    path = folder / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def load(folder: Path) -> str:
    """Load the ops of the library in `folder` into torch.ops.lmfusion. Returns "", or why it cannot."""
    version = torch.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
        return f"torch {version} is installed, and the native ops need 2.10 or later; `pip install 'torch>=2.10'`"
    libraries = sorted(folder.glob("_C*.so"))
    if not libraries:
        reason = read_build_info(folder).get("unavailable_reason") or f"they were never compiled here; {INSTALL_AGAIN}"
        return f"the native ops were not built: {reason}"
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, RuntimeError) as error:
        first_line = str(error).splitlines()[0]
        return f"{libraries[0].name} does not load ({first_line}); build it again with {INSTALL_AGAIN}"
    return ""


FOLDER = Path(__file__).resolve().parents[1]
build_info = read_build_info(FOLDER)
unavailable_reason = load(FOLDER)
native = not unavailable_reason
"""Whether torch.ops.lmfusion holds the native ops."""

if not native and os.environ.get("LMFUSION_KERNELS_BACKEND") != "reference":
    warnings.warn(f"lmfusion_kernels runs in plain PyTorch, which is slower: {unavailable_reason}", stacklevel=2)


def ignored_isa_reason() -> str:
    """Why LMFUSION_CPU_ISA has no effect; empty if it has one, or is not set."""
    value = os.environ.get("LMFUSION_CPU_ISA")
    if not value or value in INSTRUCTION_SETS:
        return ""
    return f"LMFUSION_CPU_ISA={value!r} is unknown and has no effect; known: {', '.join(INSTRUCTION_SETS)}"


if native and (_reason := ignored_isa_reason()):
    warnings.warn(_reason, stacklevel=2)


def refuse_second_derivative(op: str) -> None:
    """Make a backward through lmfusion::<op> fail instead of returning wrong numbers."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{op} of the native backend has no second derivative; backend='reference' has")

    torch.library.register_autograd(f"lmfusion::{op}", refuse)
