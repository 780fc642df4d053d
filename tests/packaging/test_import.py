"""Importing the packages is light: no network, no GPU, nothing heavy; and the host module knows nothing of torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from lmfusion_kernels.layout import build

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("transformers", "diffusers", "tokenizers", "safetensors", "PIL", "sklearn", "gguf", "triton", "torch._dynamo")

# Ends the process if anything opens a connection or looks up a name.
NO_NETWORK = """
import sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        raise SystemExit(f"network: {event} {arguments}")
sys.addaudithook(watch)
"""


def run_python(code):
    command = [sys.executable, "-c", NO_NETWORK + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_kernels_import_nothing_heavy():
    code = f"""
import torch, torch.utils.flop_counter  # this part of torch imports triton where it is installed
torch_alone = set(sys.modules)
import lmfusion_kernels
added = set(sys.modules) - torch_alone
print(*sorted(added & set({HEAVY})))
assert not torch.cuda.is_initialized()
"""
    process = run_python(code)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == []


def test_kernels_add_little_to_the_time_of_torch():
    code = """
import time, torch
start = time.process_time()
import lmfusion_kernels
print(time.process_time() - start)
"""
    process = run_python(code)
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) < 0.5


def test_lmfusion_imports_without_transformers():
    process = run_python("import lmfusion; print('transformers' in sys.modules, 'diffusers' in sys.modules)")
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    "module", ["lmfusion.model.vision", "lmfusion.data.pipeline.loader", "lmfusion.evaluation.run"]
)
def test_any_module_may_be_imported_first(module):
    process = run_python(f"import {module}")
    assert process.returncode == 0, process.stderr


def test_network_is_noticed():
    process = run_python("import socket; socket.getaddrinfo('localhost', 1)")
    assert "network: socket.getaddrinfo" in process.stderr


@pytest.mark.skipif(build._layout_native is None, reason="_layout_native was not compiled")
def test_host_module_needs_no_torch():
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_layout_native", {build._layout_native.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import numpy
print([row.tolist() for row in module.pack(numpy.array([3, 2, 1]), 5, 8)], "torch" in sys.modules)
"""
    process = run_python(code)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "[[0], [1, 2]] False"


def test_backends_can_be_printed():
    process = run_python("import lmfusion_kernels as lk; print(lk.backends())")
    assert process.returncode == 0, process.stderr
    assert "reference" in process.stdout


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
@pytest.mark.skipif(build.instruction_set() not in ("avx2", "avx512"), reason="this processor has the baseline alone")
def test_the_instruction_set_can_be_held_down(isa):
    code = f"""
import os
os.environ["LMFUSION_CPU_ISA"] = {isa!r}
from lmfusion_kernels.layout import build
print(build.instruction_set())
"""
    assert run_python(code).stdout.strip() == isa
