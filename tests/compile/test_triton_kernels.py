"""Did Triton make of its kernels what they are written for: tensor cores, no spills, shared memory that fits?"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.compile import cuobjdump

ROOT = Path(__file__).resolve().parents[2]
COMPILER = Path(__file__).resolve().parent / "triton_compiler.py"
CACHE = ROOT / "build" / "triton_compile"
LARGEST_SHARED = {80: 163 * 1024, 90: 227 * 1024}  # of a block, in bytes
LARGEST_REGISTERS = 255
LARGEST_SPILL = {"bfloat16": 0, "float16": 0, "float32": 32}
"""Bytes a thread. ptxas aims at 128 registers for one of the float32 kernels, and six values do not fit."""
LARGEST_SPILL_HIDDEN = 64
"""The same where spans are hidden: with triton 3.7 a few values do not fit into the 255 registers of sm_80."""


def case(launch, capability, dtype, **arguments):
    return {"launch": launch, "capability": capability, "arguments": {"dtype": dtype, **arguments}}


def name_of(case):
    arguments = "-".join(f"{key}={value}" for key, value in case["arguments"].items())
    return f"{case['launch']}-sm_{case['capability']}-{arguments}"


def attention_cases(capability, dtype, head_dim):
    """Forward, backward, and the forward of generation with a cache."""
    for arguments in ({"backward": False}, {"backward": True}, {"backward": False, "num_queries": 4}):
        yield case("attention", capability, dtype, head_dim=head_dim, **arguments)


def hidden_cases(capability, dtype, head_dim):
    """Forward and backward where spans are hidden."""
    for backward in (False, True):
        yield case("attention", capability, dtype, head_dim=head_dim, backward=backward, hidden=True)


# Its accumulators leave too few registers. With one pipeline stage the products would not wait for each other, but for
# memory.
SERIALIZED = {("attention_backward_keys", 256)}

QUICK = [
    case("gate_up_swiglu", 90, "bfloat16", keep=True),
    *attention_cases(90, "bfloat16", 64),
    *attention_cases(90, "bfloat16", 128),
    *attention_cases(80, "bfloat16", 128),
    *(case for capability in (80, 90) for case in hidden_cases(capability, "bfloat16", 128)),
]
THOROUGH = [case("gate_up_swiglu", 90, dtype, keep=keep) for dtype in ("bfloat16", "float16") for keep in (False, True)]
THOROUGH += [
    case
    for capability in (80, 90) for dtype in ("bfloat16", "float16") for head_dim in (64, 96, 128, 256)
    for case in attention_cases(capability, dtype, head_dim)
]  # fmt: skip
THOROUGH += [case for capability in (80, 90) for case in attention_cases(capability, "float32", 64)]
THOROUGH = [case for case in THOROUGH if case not in QUICK]


def digest(case):
    content = hashlib.sha256(json.dumps(case).encode() + importlib.metadata.version("triton").encode())
    for path in (COMPILER, COMPILER.with_name("cuobjdump.py"), *sorted(ROOT.glob("lmfusion_kernels/triton/*.py"))):
        content.update(path.read_bytes())
    return content.hexdigest()[:20]


def reports(case):
    """The kernels of a case, compiled together with all others for its architecture that are not in the cache: triton
    starts slowly. One process compiles, others wait."""
    capability = case["capability"]
    cases = [other for other in (QUICK if case in QUICK else THOROUGH) if other["capability"] == capability]
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"lock-{capability}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [other for other in cases if not (CACHE / f"{digest(other)}.json").exists()]
        if case in missing:
            environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
            environment |= {"TRITON_CACHE_DIR": str(CACHE / "triton"), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, str(COMPILER), str(capability), json.dumps(missing)]
            result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr[-4000:]
            for other, found in zip(missing, json.loads(result.stdout.splitlines()[-1]), strict=True):
                (CACHE / f"{digest(other)}.json").write_text(json.dumps(found))
    return json.loads((CACHE / f"{digest(case)}.json").read_text())


def kernels(case):
    """The kernels of a case with what the compiler reports of each."""
    pytest.importorskip("triton", reason="triton is not installed")
    if cuobjdump.find() is None:
        pytest.skip("there is no cuobjdump beside triton")
    found = reports(case)
    assert found, "nothing was launched"
    architecture = {80: "sm_80", 90: "sm_90a"}[case["capability"]]
    for report in found:
        kernel = cuobjdump.Kernel(
            report["kernel"], architecture, report["registers"], report["stack"], report["shared"]
        )
        kernel.instructions = Counter(report["instructions"])
        yield kernel, report["num_dots"], report["is_serialized"]


CASES = [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in THOROUGH)]


@pytest.mark.timeout(900)  # the first case of many waits for all of them
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_kernels(case):
    for kernel, num_dots, is_serialized in kernels(case):
        is_hidden = case["arguments"].get("hidden", False)
        largest_spill = LARGEST_SPILL[case["arguments"]["dtype"]] or is_hidden * LARGEST_SPILL_HIDDEN
        assert kernel.stack <= largest_spill, f"{kernel.name} spills {kernel.stack} bytes"
        assert largest_spill or kernel.local_accesses == 0, f"{kernel.name} uses local memory"
        if (kernel.name, case["arguments"].get("head_dim")) not in SERIALIZED:
            assert not is_serialized, f"{kernel.name}: each product waits for the one before it"
        assert kernel.registers <= LARGEST_REGISTERS
        assert kernel.shared <= LARGEST_SHARED[case["capability"]], kernel.name
        # Tiles of few queries have too few rows for a warp group, and float32 is multiplied exactly.
        if num_dots and case["arguments"]["dtype"] != "float32":
            is_large = case["capability"] == 90 and "split" not in kernel.name
            assert kernel.count("HGMMA" if is_large else "HMMA") > 0, f"{kernel.name} multiplies without tensor cores"
        wide = kernel.count("LDG", "128") + kernel.count("LDGSTS", "128") + kernel.count("UTMALDG")
        assert wide > 0, f"{kernel.name} loads less than 16 bytes at a time"


def test_every_kernel_is_launched():
    """The cases that are not slow leave no kernel out."""
    found = {kernel.name for case in QUICK for kernel, *_ in kernels(case)}
    source = "".join(path.read_text() for path in ROOT.glob("lmfusion_kernels/triton/*.py"))
    defined = set(re.findall(r"@triton\.jit.*\ndef (\w+)\(", source))
    called = set(re.findall(r"(\w+)\[[^\n\]]*\]\(", source))
    assert found == defined & called
