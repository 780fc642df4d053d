"""CPU kernels of smaller instruction sets, which this processor would not choose, pass the same tests."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.ops.row_ops import needs_native

FILES = [
    "test_rms_norm.py",
    "test_rope_reorder.py",
    "test_swiglu.py",
    "test_swiglu_extremes.py",
    "test_row_extremes.py",
]
SELECTED = "equals_reference and mixed or head_sizes or extreme or rounds_to_nearest or not_contiguous"
ATTENTION = ["../attention/test_attention_extremes.py", "../attention/test_hybrid_attention.py"]
SELECTED_ATTENTION = "extremes or equals_reference and not random or test_scale or log_sum_exp or see_nothing"


@needs_native
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one instruction set on this architecture")
@pytest.mark.parametrize(
    ("files", "selected"), [(FILES, SELECTED), (ATTENTION, SELECTED_ATTENTION)], ids=["rows", "attention"]
)
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_cpu_kernels(isa, files, selected):
    folder = Path(__file__).resolve().parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selected]
    command += [str(folder / name) for name in files]
    environment = {**os.environ, "LMFUSION_CPU_ISA": isa}
    result = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout


@needs_native
@pytest.mark.parametrize(("isa", "is_told"), [("avx", True), ("baseline", False), ("", False)])
def test_an_unknown_instruction_set_is_reported(isa, is_told):
    environment = {**os.environ, "LMFUSION_CPU_ISA": isa}
    command = [sys.executable, "-c", "import lmfusion_kernels"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ("LMFUSION_CPU_ISA='avx' is unknown and has no effect; known: baseline, avx2" in result.stderr) == is_told
    assert ("LMFUSION_CPU_ISA" in result.stderr) == is_told
