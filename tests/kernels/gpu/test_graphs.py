"""A step that is replayed as a CUDA graph equals the launched step, and the host does not wait for it."""

from pathlib import Path

import pytest
import torch

from lmfusion.generation.graphs import ReplayedStep, recorder_for
from tests.kernels.gpu.support import DEVICE, needs_gpu, no_host_sync
from tests.lmfusion.conftest import tiny_llama  # noqa: F401, the fixture
from tests.lmfusion.generation.replays import STEPS, assert_replayed, make_model


@needs_gpu
@pytest.mark.parametrize("name", STEPS)
def test_replayed_steps(tiny_llama: Path, name: str) -> None:  # noqa: F811
    model = make_model(tiny_llama, DEVICE)
    step, make_calls = STEPS[name]
    recorder = recorder_for(torch.device(DEVICE), None)
    with torch.no_grad():
        assert_replayed(model, recorder, step, make_calls(), tolerance=1e-4, replaying=no_host_sync)


@needs_gpu
def test_what_cannot_be_recorded_is_run_where_it_was_before() -> None:
    device = torch.device(DEVICE)
    stream, x = torch.cuda.current_stream(), torch.ones(3, device=device)
    step = ReplayedStep(lambda x: x * x.sum().item(), device, recorder_for(device, None))
    with pytest.warns(UserWarning, match="steps run without CUDA graphs"):
        assert step(x).tolist() == [3, 3, 3]
    assert torch.cuda.current_stream() == stream
    assert step(2 * x).tolist() == [12, 12, 12]
