"""Digests: equal for equal values, whatever the order of keys or the layout in memory, and different otherwise."""

import hashlib

import pytest
import torch

from lmfusion.utils.hashing import tensor_sha256, values_sha256


def test_values_in_any_order():
    assert values_sha256({"a": 1, "b": [1, 2]}) == values_sha256({"b": [1, 2], "a": 1})
    assert values_sha256({"a": 1}) == hashlib.sha256(b'{"a": 1}').hexdigest()
    assert values_sha256([1, 2]) != values_sha256([2, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_by_their_bytes(dtype):
    tensor = torch.arange(12).view(3, 4).to(dtype)
    assert tensor_sha256(tensor.t().contiguous().t()) == tensor_sha256(tensor)
    assert tensor_sha256(torch.nn.Parameter(tensor, requires_grad=dtype.is_floating_point)) == tensor_sha256(tensor)
    assert tensor_sha256(tensor + 1) != tensor_sha256(tensor)
    flat = tensor.flatten().view(torch.uint8).numpy().tobytes()
    assert tensor_sha256(tensor) == hashlib.sha256(flat).hexdigest()
