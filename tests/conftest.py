"""What holds for every test: deterministic, poisoned memory, GPU tests skipped where there is no GPU."""

import os

import pytest
import torch
from hypothesis import settings

# With this, memory from torch.empty is filled with NaN (largest integer), also inside C++ ops: a row that a kernel
# forgets to write is seen by any comparison.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

settings.register_profile("lmfusion", deadline=None, max_examples=50, derandomize="CI" in os.environ)
settings.load_profile("lmfusion")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
