"""Do layout, ops and block give on a GPU what they give on the CPU? (Today they run in plain PyTorch there.)"""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

import lmfusion_kernels as lk

pytestmark = pytest.mark.gpu

DOCUMENTS = [
    [("text", 5), ("marker", 1), ("image", 16), ("marker", 1), ("text", 3)],
    [("marker", 1), ("image", 4), ("marker", 1), ("text", 7)],
]


def test_layout_is_built_on_the_host_and_copied():
    on_cpu, on_gpu = lk.TokenLayout.from_spans(DOCUMENTS), lk.TokenLayout.from_spans(DOCUMENTS, device="cuda")
    for field in fields(on_cpu):
        value, copy = getattr(on_cpu, field.name), getattr(on_gpu, field.name)
        if isinstance(value, Tensor):
            assert copy.device.type == "cuda"
            assert torch.equal(copy.cpu(), value), field.name
        else:
            assert copy == value, field.name


@pytest.mark.parametrize("frozen_text", [True, False])
def test_block_equals_the_cpu(frozen_text):
    torch.manual_seed(0)
    block = lk.RoutedBlock(32, 48, 4, 2, qk_norm=True, frozen_text=frozen_text).double()
    layout = lk.TokenLayout.from_spans(DOCUMENTS, frozen_text=frozen_text)
    x = torch.randn(layout.num_tokens, 32, dtype=torch.float64)
    inv_freq = 1e4 ** -torch.linspace(0, 1, 4)
    results = []
    for device in ("cpu", "cuda"):
        moved, there = block.to(device), layout.to(device)
        moved.zero_grad(set_to_none=True)
        y = moved(x.to(device), there, lk.rope_tables(there.position, inv_freq.to(device)))
        y[layout.num_constant :].square().sum().backward()
        results.append([y.detach().cpu(), *(p.grad.cpu() for p in moved.parameters() if p.grad is not None)])
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
