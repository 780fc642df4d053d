"""Triton's kernels, as compiled for sm_90a and sm_80 in bfloat16 and float16, give the right numbers in the emulator.

By the Triton that is installed and by the oldest one that the metadata admits. Errors are at most three times those of
the reference in the same dtype (`LARGEST_ERROR`). An error of the emulator (an access out of bounds, a missing fence or
wait) is a failure.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compile.test_triton_kernels import OLDEST, version_of

ROOT = Path(__file__).resolve().parents[3]


def attention(head_dim, capability=90, dtype="bfloat16", schedule=None, **arguments):
    return {
        "case": "attention",
        "capability": capability,
        "dtype": dtype,
        "arguments": {"head_dim": head_dim, **arguments},
        "schedule": schedule or {},
    }


def gate_up(dtype="bfloat16", schedule=None, **arguments):
    case = {"case": "gate_up_swiglu", "capability": 90, "dtype": dtype, "arguments": arguments}
    return case | {"schedule": schedule or {}}


SKEWED, EARLY = {"is_skewed": True}, {"is_late": False}
QUICK = [
    attention(64, documents="mixed", backward=True),
    attention(64, documents="small", backward=True, num_constant=40, schedule=SKEWED),
    attention(64, documents="hidden", backward=True),
    attention(128, documents="small", backward=True),
    attention(64, documents="small", num_queries=5),
    attention(64, documents="small", capability=80, backward=True),
]
OF_OLDEST = [
    attention(64, documents="mixed", backward=True, schedule=SKEWED),
    attention(128, documents="small", num_queries=70),
    gate_up(),
]
THOROUGH = [
    *(attention(d, documents="mixed", backward=True, dtype=t) for d in (64, 128) for t in ("bfloat16", "float16")),
    *(attention(128, documents="hidden", backward=True, schedule=schedule) for schedule in (SKEWED, EARLY)),
    *(attention(128, documents="mixed", backward=True, schedule=SKEWED | {"seed": seed}) for seed in (1, 2)),
    *(attention(128, documents="mixed", num_queries=count) for count in (1, 16, 128)),
    *(attention(d, documents="hidden", capability=80, backward=True) for d in (64, 128)),
    *(gate_up(dtype, schedule) for dtype in ("bfloat16", "float16") for schedule in (SKEWED, EARLY)),
]
MUTATED = {"case": "attention", "capability": 90, "dtype": "bfloat16"}
MUTATED |= {"arguments": {"head_dim": 64, "documents": "small"}, "kernel": "attention_forward"}
REMOVED = {
    "wait for a copy": (r"mbarrier\.try_wait[^;]*;", {0, 1, 2, 3}),
    "wait for a product": (r"wgmma\.wait_group[^;]*;", {0, 2, 3}),
    "fence": (r"fence\.proxy\.async[^;]*;", {0, 3}),
}
"""Instructions of the forward kernel that are taken out one by one, and the numbers that are missed.

The wait 1 follows another one without a product between them, and the fences 1 and 2 stand behind the initialisation
of mbarriers, which the emulator does not order. Barriers of the whole block are not tried: of 21, three are noticed
with one random order of warps."""


def outcomes(triton, cases):
    """What became of `cases`, run by a process with the installed or the oldest triton."""
    if version_of(triton) is None:
        pytest.skip(f"the {triton} triton is not here; `make test` installs it")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(ROOT / "build" / "triton_emulation" / triton), "OMP_NUM_THREADS": "1"}
    path = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join([str(OLDEST), *path] if triton == "oldest" else path)
    command = [sys.executable, "-m", "tests.kernels.ptx_emulation.cases", json.dumps(cases)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    version, found = json.loads(result.stdout.splitlines()[-1])
    assert version == version_of(triton)
    return found


def name_of(case):
    values = {**case["arguments"], **case["schedule"]}
    words = [
        case["case"],
        f"sm_{case['capability']}",
        case["dtype"],
        *(f"{key}={value}" for key, value in values.items()),
    ]
    return "-".join(words)


def check(triton, case):
    [outcome] = outcomes(triton, [case])
    assert outcome["is_right"], (outcome["fault"], outcome["errors"])
    assert outcome["launched"]


@pytest.mark.parametrize("case", QUICK, ids=name_of)
def test_kernels_of_the_installed_triton(case):
    check("installed", case)


@pytest.mark.parametrize("case", OF_OLDEST, ids=name_of)
def test_kernels_of_the_oldest_triton(case):
    check("oldest", case)


@pytest.mark.skipif("LMFUSION_THOROUGH" not in os.environ, reason="minutes; set LMFUSION_THOROUGH=1")
@pytest.mark.parametrize("triton", ["installed", "oldest"])
@pytest.mark.parametrize("case", THOROUGH, ids=name_of)
def test_more_kernels(triton, case):
    check(triton, case)


@pytest.mark.slow
@pytest.mark.parametrize("kind", REMOVED)
def test_what_is_removed_is_noticed(kind):
    pattern, expected = REMOVED[kind]
    removed = [{**MUTATED, "removed": (pattern, number)} for number in range(6)]
    found = outcomes("installed", removed)
    assert {number for number, outcome in enumerate(found) if not outcome["is_right"]} == expected
