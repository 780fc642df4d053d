"""Marks every test of this folder as one that needs a GPU; they are skipped at run time if there is none."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kernels.gpu.support import ON_GPU, synchronize

# A GPU machine may have only torch and the needs of the kernels.
NEEDED = ("transformers", "tokenizers", "diffusers", "gguf", "safetensors", "PIL", "yaml")
OF_THE_MODEL = ["test_batches.py", "test_generation.py", "test_graphs.py"]
collect_ignore = [] if all(importlib.util.find_spec(name) for name in NEEDED) else OF_THE_MODEL


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ON_GPU:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def own_errors_only() -> Iterator[None]:
    """Synchronise after each test, because kernels report errors late: the failure must be that of the right test."""
    try:
        synchronize()
    except (RuntimeError, torch.AcceleratorError):
        pytest.skip("an earlier test broke this process's access to the GPU")
    yield
    synchronize()
