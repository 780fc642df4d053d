"""Triton compiles its kernels as intended: tensor cores, no spills, fences, and shared memory that fits.

Checked with the installed Triton, and with the oldest one that the metadata admits, which `make test` unpacks.
"""

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

from tests.kernels.compile import cuobjdump

ROOT = Path(__file__).resolve().parents[3]
COMPILER = Path(__file__).resolve().parent / "triton_compiler.py"
CACHE = ROOT / "build" / "triton_compile"
LARGEST_SHARED = {80: 163 * 1024, 90: 227 * 1024}  # per block, in bytes
LARGEST_REGISTERS = 255
LARGEST_SPILL_FLOAT32 = 32
"""Spilled bytes per thread. ptxas aims at 128 registers for one of the float32 kernels, and six values do not fit."""
LARGEST_SPILL_HIDDEN = {("sm_80", 128): 64, ("sm_90a", 256): 32}
"""The same with hidden spans, by architecture and head size: a few values do not fit into 255 registers."""
LARGEST_SPILL = {
    ("oldest", "attention_forward", 256): 16,
    ("installed", "attention_forward_split", 256): 8,  # ptxas aims at 168 registers on sm_80
}
"""The same for other kernels by Triton, name and head size; 0 for kernels that are not listed."""
OLDEST = Path(sys.prefix) / "oldest" / "triton"
"""The folder into which `make test` unpacks the oldest Triton."""
SCRATCH = {("attention_backward_keys", 256)}
"""Kernels, by name and head size, whose st.shared only redistributes tiles among the threads of the block, which read
them by ld.shared. proxy_fences cannot distinguish that from an operand of wgmma."""


def case(launch, capability, dtype, **arguments):
    return {"launch": launch, "capability": capability, "arguments": {"dtype": dtype, **arguments}}


def name_of(value):
    if isinstance(value, str):
        return value
    arguments = "-".join(f"{key}={value}" for key, value in value["arguments"].items())
    return f"{value['launch']}-sm_{value['capability']}-{arguments}"


def attention_cases(capability, dtype, head_dim):
    """Forward, backward, and the forward of generation with a cache: with tiles of 16 rows, and with the largest."""
    for backward in (False, True):
        yield case("attention", capability, dtype, head_dim=head_dim, backward=backward)
    for num_queries in (4, 128):
        yield case("attention", capability, dtype, head_dim=head_dim, backward=False, num_queries=num_queries)


def hidden_cases(capability, dtype, head_dim):
    """Forward and backward with hidden spans."""
    for backward in (False, True):
        yield case("attention", capability, dtype, head_dim=head_dim, backward=backward, hidden=True)


# Its accumulators leave too few registers. With one pipeline stage the products would wait for memory instead of each
# other.
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
THOROUGH += [case for head_dim in (64, 256) for case in hidden_cases(90, "bfloat16", head_dim)]
THOROUGH += [case for capability in (80, 90) for case in attention_cases(capability, "float32", 64)]
THOROUGH = [case for case in THOROUGH if case not in QUICK]
OF_OLDEST = [case for case in THOROUGH if case["capability"] == 90 and case["arguments"]["dtype"] != "float32"]
"""The cases for the oldest Triton besides QUICK: all kernels with wgmma."""


def version_of(triton):
    """The version of the "installed" or the "oldest" Triton; None if it is not available."""
    path = {"installed": None, "oldest": [str(OLDEST)]}[triton]
    found = importlib.metadata.distributions(name="triton", **({} if path is None else {"path": path}))
    return next((distribution.version for distribution in found), None)


def largest_spill_of(triton, kernel, case):
    arguments = case["arguments"]
    if arguments["dtype"] == "float32":
        return LARGEST_SPILL_FLOAT32
    head_dim = arguments.get("head_dim")
    if arguments.get("hidden"):
        return LARGEST_SPILL_HIDDEN.get((kernel.architecture, head_dim), 0)
    return LARGEST_SPILL.get((triton, kernel.name, head_dim), 0)


def digest(triton, case):
    content = hashlib.sha256(json.dumps(case).encode() + version_of(triton).encode())
    helpers = (COMPILER.with_name(name) for name in ("cuobjdump.py", "proxy_fences.py"))
    for path in (COMPILER, *helpers, *sorted(ROOT.glob("lmfusion_kernels/triton/*.py"))):
        content.update(path.read_bytes())
    return content.hexdigest()[:20]


def reports(triton, case):
    """The kernels of a case.

    Compiles all cases for its architecture that are not in the cache at once, because Triton starts slowly. One process
    compiles, others wait.
    """
    capability = case["capability"]
    thorough = THOROUGH if triton == "installed" else OF_OLDEST
    cases = [other for other in (QUICK if case in QUICK else thorough) if other["capability"] == capability]
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"lock-{triton}-{capability}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [other for other in cases if not (CACHE / f"{digest(triton, other)}.json").exists()]
        if case in missing:
            environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
            environment |= {"TRITON_CACHE_DIR": str(CACHE / "triton"), "OMP_NUM_THREADS": "1"}
            if triton == "oldest":
                environment["PYTHONPATH"] = os.pathsep.join([str(OLDEST), environment.get("PYTHONPATH", "")])
            command = [sys.executable, str(COMPILER), str(capability), json.dumps(missing)]
            result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr[-4000:]
            version, found = json.loads(result.stdout.splitlines()[-1])
            assert version == version_of(triton)
            for other, kernels_of_other in zip(missing, found, strict=True):
                (CACHE / f"{digest(triton, other)}.json").write_text(json.dumps(kernels_of_other))
    return json.loads((CACHE / f"{digest(triton, case)}.json").read_text())


def kernels(triton, case):
    """The kernels of a case with the compiler's report of each."""
    pytest.importorskip("triton", reason="triton is not installed")
    if cuobjdump.find() is None:
        pytest.skip("there is no cuobjdump beside triton")
    if version_of(triton) is None:
        pytest.skip(f"there is no Triton in {OLDEST}: `make test` puts the oldest one there")
    found = reports(triton, case)
    assert found, "nothing was launched"
    architecture = {80: "sm_80", 90: "sm_90a"}[case["capability"]]
    for report in found:
        kernel = cuobjdump.Kernel(
            report["kernel"], architecture, report["registers"], report["stack"], report["shared"]
        )
        kernel.instructions = Counter(report["instructions"])
        yield kernel, report


CASES = [
    *(("installed", case) for case in QUICK),
    *(pytest.param("installed", case, marks=pytest.mark.slow) for case in THOROUGH),
    *(("oldest", case) for case in QUICK),
    *(pytest.param("oldest", case, marks=pytest.mark.slow) for case in OF_OLDEST),
]


@pytest.mark.timeout(900)  # the first case waits until all are compiled
@pytest.mark.parametrize(("triton", "case"), CASES, ids=name_of)
def test_kernels(triton, case):
    head_dim = case["arguments"].get("head_dim")
    for kernel, report in kernels(triton, case):
        largest_spill = largest_spill_of(triton, kernel, case)
        assert kernel.stack <= largest_spill, f"{kernel.name} spills {kernel.stack} bytes"
        assert largest_spill or kernel.local_accesses == 0, f"{kernel.name} uses local memory"
        if (kernel.name, head_dim) not in SERIALIZED:
            assert not report["is_serialized"], f"{kernel.name}: each product waits for the one before it"
        assert kernel.registers <= LARGEST_REGISTERS
        assert kernel.shared <= LARGEST_SHARED[case["capability"]], kernel.name
        # Tiles of few queries have too few rows for a warp group, and float32 products are exact.
        if report["num_dots"] and case["arguments"]["dtype"] != "float32":
            is_large = case["capability"] == 90 and case["arguments"].get("num_queries") != 4
            assert kernel.count("HGMMA" if is_large else "HMMA") > 0, f"{kernel.name} multiplies without tensor cores"
        wide = kernel.count("LDG", "128") + kernel.count("LDGSTS", "128") + kernel.count("UTMALDG")
        has_few_parts = kernel.name == "join_splits" and case["arguments"].get("num_queries") == 128
        assert wide > 0 or has_few_parts, f"{kernel.name} loads less than 16 bytes at a time"
        unfenced = [pair for pair in report["unfenced"] if not pair["write"].startswith(("st.", "stmatrix"))]
        if (kernel.name, head_dim) not in SCRATCH:
            unfenced = report["unfenced"]
        assert unfenced == [], f"{kernel.name}: a fence is missing"


def test_every_kernel_is_launched():
    """The cases that are not slow cover every kernel."""
    found = {kernel.name for case in QUICK for kernel, _ in kernels("installed", case)}
    source = "".join(path.read_text() for path in ROOT.glob("lmfusion_kernels/triton/*.py"))
    defined = set(re.findall(r"@triton\.jit.*\ndef (\w+)\(", source))
    called = set(re.findall(r"(\w+)\[[^\n\]]*\]\(", source))
    assert found == defined & called
