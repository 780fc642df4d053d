"""Shared by the tests of row ops: layouts, random rows, and the comparison with the float64 reference."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import lmfusion_kernels as lk
from lmfusion_kernels.runtime import library

needs_native = pytest.mark.skipif(not library.native, reason=f"native ops absent: {library.unavailable_reason}")

LAYOUTS = {
    "mixed": [[("text", 5), ("image", 9), ("text", 3)], [("image", 4), ("text", 40)], [("text", 2), ("marker", 1)]],
    "all text": [[("text", 7)]],
    "all image": [[("image", 70)]],
    "one row": [[("image", 1)]],
    "empty": [],
}


def make_layout(name: str) -> lk.TokenLayout:
    return lk.TokenLayout.from_spans(LAYOUTS[name])


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def flatten(value: object) -> list[Tensor]:
    """The tensors of nested tuples, in order."""
    if isinstance(value, Tensor):
        return [value]
    assert isinstance(value, Sequence)
    return [tensor for part in value for tensor in flatten(part)]


def run(op: Callable, tensors: dict[str, Tensor], frozen: Sequence[str] = ()) -> dict[str, Tensor | None]:
    """Results of `op(**tensors)` and the gradients of all tensors except `frozen`, for a fixed random loss."""
    leaves = {name: t.detach().clone().requires_grad_(name not in frozen) for name, t in tensors.items()}
    results = flatten(op(**leaves))
    grads = [random(*result.shape, seed=9 + i).to(result.dtype) for i, result in enumerate(results)]
    trained = [(result, grad) for result, grad in zip(results, grads, strict=True) if result.requires_grad]
    torch.autograd.backward(*zip(*trained, strict=True))
    outcome: dict[str, Tensor | None] = {f"result {i}": result.detach() for i, result in enumerate(results)}
    return outcome | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}


def assert_as_good_as_reference(op: Callable, tensors: dict[str, Tensor], frozen: Sequence[str] = ()) -> None:
    """The native `op(backend, **tensors)` is at most twice as far from the float64 reference as the plain one is.

    Also checks that tensors in `frozen` get no gradient.
    """
    wide = {name: t.double() for name, t in tensors.items()}
    exact = run(lambda **t: op("reference", **t), wide, frozen)
    plain = run(lambda **t: op("reference", **t), tensors, frozen)
    native = run(lambda **t: op("native", **t), tensors, frozen)
    assert native.keys() == exact.keys()
    for name, target in exact.items():
        result = native[name]
        if target is None:
            assert result is None, f"{name} was computed for nothing"
            continue
        assert result is not None and result.shape == target.shape and result.dtype == plain[name].dtype, name
        if target.numel() == 0:
            continue
        floor = 4 * torch.finfo(result.dtype).eps * target.abs().max().item() + 1e-30
        error, plain_error = ((t.double() - target).abs().max().item() for t in (result, plain[name]))
        assert error <= 2 * plain_error + floor, f"{name}: error {error:.3g}, plain PyTorch's {plain_error:.3g}"


def assert_compiles(op: Callable, tensors: dict[str, Tensor], backend: str = "aot_eager") -> None:
    """`torch.compile(fullgraph=True)` of the native op gives the same results and gradients."""
    torch._dynamo.reset()
    eager = run(lambda **t: op("native", **t), tensors)
    compiled = run(torch.compile(lambda **t: op("native", **t), fullgraph=True, backend=backend), tensors)
    for name, expected in eager.items():
        torch.testing.assert_close(compiled[name], expected, msg=lambda text, name=name: f"{name}: {text}")
