"""A library that is missing, damaged or meets an old torch gives one clear sentence, never an exception."""

import json

import pytest
import torch

from lmfusion_kernels.runtime import library


def test_the_library_here_is_loaded():
    if not library.native:
        pytest.skip(library.unavailable_reason)
    assert library.unavailable_reason == ""
    assert hasattr(torch.ops.lmfusion, "rms_norm")
    assert library.build_info["compiler"]


def test_nothing_was_compiled(tmp_path):
    assert library.load(tmp_path) == (
        "the native ops were not built: they were never compiled here; "
        "`python setup.py build_ext --inplace` in the checkout, or install it again"
    )


def test_the_build_tells_why(tmp_path):
    (tmp_path / "_build.json").write_text(json.dumps({"unavailable_reason": "no C++ compiler was found; install one"}))
    assert library.load(tmp_path) == "the native ops were not built: no C++ compiler was found; install one"


def test_a_library_that_does_not_load(tmp_path):
    (tmp_path / "_C.so").write_bytes(b"\x7fELF of another machine")
    unavailable_reason = library.load(tmp_path)
    assert unavailable_reason.startswith("_C.so does not load (")
    assert "\n" not in unavailable_reason
    assert "setup.py build_ext" in unavailable_reason


@pytest.mark.parametrize("version", ["2.9.1+cu128", "1.13.0"])
def test_an_old_torch(tmp_path, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    assert library.load(tmp_path) == (
        f"torch {version} is installed, and the native ops need 2.10 or later; `pip install 'torch>=2.10'`"
    )


@pytest.mark.parametrize("version", ["2.10.0", "2.15.0a0+git1234", "3.0.1"])
def test_a_new_torch_is_no_obstacle(tmp_path, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    assert "never compiled" in library.load(tmp_path)
