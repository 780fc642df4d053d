"""The choice of the backend, errors for a request that cannot be met, and the report of `backends()`."""

import re

import pytest
import torch

import lmfusion_kernels as lk
from lmfusion_kernels.attention import dispatch
from lmfusion_kernels.runtime import library
from lmfusion_kernels.runtime.backends import ATTENTION_KERNELS, choose_backend


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("LMFUSION_KERNELS_BACKEND", raising=False)
    yield
    dispatch._cached_unavailable_reason.cache_clear()  # what was said of a library that is not there


@pytest.fixture
def with_library(monkeypatch):
    monkeypatch.setattr(library, "native", True)
    monkeypatch.setattr(library, "unavailable_reason", "")
    monkeypatch.setattr(
        library, "build_info", {"cuda_architectures": [], "cuda_unavailable_reason": "it was built without nvcc"}
    )


@pytest.fixture
def without_library(monkeypatch):
    monkeypatch.setattr(library, "native", False)
    monkeypatch.setattr(library, "unavailable_reason", "the native ops were not built: no compiler; install one")
    dispatch._cached_unavailable_reason.cache_clear()


@pytest.mark.usefixtures("with_library")
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, "native"),
        (torch.bfloat16, "native"),
        (torch.float16, "reference"),
        (torch.float64, "reference"),
    ],
)
def test_dtype_decides(dtype, expected):
    assert (
        choose_backend(None, torch.ones(2), None, torch.ones(2, dtype=dtype), torch.ones(2, dtype=torch.int32))
        == expected
    )


@pytest.mark.usefixtures("with_library")
def test_the_argument_and_the_environment(monkeypatch):
    x = torch.ones(2)
    assert choose_backend("reference", x) == "reference"
    monkeypatch.setenv("LMFUSION_KERNELS_BACKEND", "reference")
    assert choose_backend(None, x) == "reference"
    assert choose_backend("native", x) == "native"  # the argument is nearer than the environment
    monkeypatch.setenv("LMFUSION_KERNELS_BACKEND", "")
    assert choose_backend(None, x) == "native"


@pytest.mark.usefixtures("with_library")
def test_a_request_that_cannot_be_met():
    with pytest.raises(
        ValueError, match=r"native backend was asked for, but it takes float32 and bfloat16 on cpu, not float64"
    ):
        choose_backend("native", torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"but it runs on cpu and cuda, not on mps.*backend='reference'"):
        choose_backend("native", FakeDevice("mps"))
    with pytest.raises(ValueError, match=r"but it was built without nvcc"):
        choose_backend("native", FakeDevice("cuda"))
    assert choose_backend(None, FakeDevice("cuda")) == "reference"


class FakeDevice:
    """The attributes of a tensor that `choose_backend` reads, on a device that need not exist."""

    dtype = torch.float32

    def __init__(self, device):
        self.device = torch.device(device)

    def is_floating_point(self):
        return True


def test_an_unknown_backend(monkeypatch):
    with pytest.raises(ValueError, match="backend='cuda' is unknown; known: native, reference, triton, flash,"):
        choose_backend("cuda")
    monkeypatch.setenv("LMFUSION_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="LMFUSION_KERNELS_BACKEND='fast' is unknown"):
        choose_backend(None)


@pytest.mark.usefixtures("without_library")
def test_without_the_library():
    assert choose_backend(None, torch.ones(2)) == "reference"
    with pytest.raises(ValueError, match="but the native ops were not built: no compiler; install one"):
        choose_backend("native", torch.ones(2))
    here = lk.backends()
    assert not here["native-cpu"].available
    assert here["native-cpu"].detail == "the native ops were not built: no compiler; install one"
    assert here["reference"].chosen_for[0] == "cpu"


@pytest.mark.usefixtures("with_library")
def test_the_table(monkeypatch):
    here = lk.backends()
    assert list(here) == ["native-cpu", "native-cuda", *ATTENTION_KERNELS, "reference"]
    assert here["native-cpu"].chosen_for == ("cpu",)
    assert here["native-cuda"].detail == "it was built without nvcc"
    lines = repr(here).splitlines()
    assert len(lines) == 1 + len(here)
    assert "chosen for cpu" in lines[1]
    assert "not here" in lines[2]
    monkeypatch.setenv("LMFUSION_KERNELS_BACKEND", "reference")
    assert lk.backends()["native-cpu"].chosen_for == ()
    assert lk.backends()["reference"].chosen_for[0] == "cpu"


@pytest.mark.usefixtures("with_library")
@pytest.mark.parametrize(
    ("asked", "note"),
    [
        (
            "flash",
            r"=flash asks for flash attention, which cannot be had on cpu \(it runs on CUDA .*\) and on cuda \(.*\)",
        ),
        ("native", r"=native asks for native, which cannot be had on cuda \(it was built without nvcc\); ops .* raise"),
        ("reference", "=reference asks for reference$"),
        ("fast", "='fast' is unknown; known: native, reference, .*; every op without an argument backend= raises this"),
    ],
)
def test_the_table_tells_of_the_environment(monkeypatch, asked, note):
    assert lk.backends().note == ""
    monkeypatch.setenv("LMFUSION_KERNELS_BACKEND", asked)
    here = lk.backends()
    assert re.match("LMFUSION_KERNELS_BACKEND" + note, here.note)
    assert repr(here).splitlines()[-1] == here.note
    chosen = {name for name, backend in here.items() if "cpu" in backend.chosen_for}
    assert (
        chosen == {"flash": {"native-cpu"}, "native": {"native-cpu"}, "reference": {"reference"}, "fast": set()}[asked]
    )


@pytest.mark.usefixtures("without_library")
def test_the_table_without_the_library_that_was_requested(monkeypatch):
    monkeypatch.setenv("LMFUSION_KERNELS_BACKEND", "native")
    here = lk.backends()
    assert "cannot be had on cpu (the native ops were not built: no compiler; install one) and on cuda (" in here.note
    assert not any(backend.chosen_for for backend in here.values())


@pytest.mark.usefixtures("with_library")
def test_the_table_tells_of_an_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("LMFUSION_CPU_ISA", "avx2")
    assert "LMFUSION_CPU_ISA" not in repr(lk.backends())
    monkeypatch.setenv("LMFUSION_CPU_ISA", "bogus")
    assert lk.backends()["native-cpu"].detail.endswith(
        "LMFUSION_CPU_ISA='bogus' is unknown and has no effect; known: baseline, avx2"
    )


def test_choose_can_be_compiled():
    def double(x):
        return x * 2 if choose_backend(None, x) == "native" else x + x

    x = torch.ones(3)
    assert torch.equal(torch.compile(double, fullgraph=True, backend="eager")(x), 2 * x)
