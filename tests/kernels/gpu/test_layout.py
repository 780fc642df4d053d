"""A layout on the GPU equals the one that was built on the host."""

from dataclasses import fields

import pytest
from torch import Tensor

import lmfusion_kernels as lk

pytestmark = pytest.mark.gpu

DOCUMENTS = [
    [("text", 5), ("marker", 1), ("image", 16), ("marker", 1), ("text", 3)],
    [("marker", 1), ("image", 4), ("marker", 1), ("text", 7)],
]


@pytest.mark.parametrize("frozen_text", [True, False])
def test_layout_is_built_on_the_host_and_copied(frozen_text):
    on_cpu = lk.TokenLayout.from_spans(DOCUMENTS, frozen_text=frozen_text)
    on_gpu = lk.TokenLayout.from_spans(DOCUMENTS, frozen_text=frozen_text, device="cuda")
    for field in fields(on_cpu):
        value, copy = getattr(on_cpu, field.name), getattr(on_gpu, field.name)
        if isinstance(value, Tensor):
            assert copy.device.type == "cuda"
            assert copy.data_ptr() % 64 == 0 or copy.numel() == 0, field.name
            assert copy.cpu().equal(value), field.name
        else:
            assert copy == value, field.name
