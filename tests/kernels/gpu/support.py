"""Shared parts of the GPU tests: the device, cases, and one criterion: at most twice the error of plain PyTorch.

LMFUSION_TEST_DEVICE=cpu runs the tests on the CPU, to try them before a GPU is available.
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import lmfusion_kernels as lk
from lmfusion_kernels.attention import dispatch

DEVICE = os.environ.get("LMFUSION_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="there is nothing to see on a CPU")

DOCUMENTS = {
    "mixed": [
        [("text", 5), ("marker", 1), ("image", 70), ("marker", 1), ("text", 13)],
        [("marker", 1), ("image", 4), ("marker", 1), ("text", 200), ("image", 33), ("image", 1)],
        [("text", 1)],
    ],
    "caption first": [[("text", 70), ("marker", 1), ("image", 64), ("marker", 1)], [("text", 3), ("image", 130)]],
    "hidden": [
        [("text", 40), ("image", 70, "hidden"), ("full", [("marker", 1), ("image", 70), ("marker", 1)]), ("text", 13)],
        [("full", [("marker", 1), ("image", 130)], "hidden"), ("image", 64), ("text", 9, "hidden"), ("text", 5)],
    ],
    "all text": [[("text", 130)], [("text", 1)], [("text", 64)]],
    "all image": [[("image", 150)], [("image", 1)]],
    "one row": [[("image", 1)]],
    "empty": [],
}


def make_layout(name: str, frozen_text: bool = True) -> lk.TokenLayout:
    return lk.TokenLayout.from_spans(DOCUMENTS[name], frozen_text=frozen_text, device=DEVICE)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """The same numbers on every device."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def flatten(value: object) -> list[Tensor]:
    """The tensors of nested tuples, in order."""
    if isinstance(value, Tensor):
        return [value]
    assert isinstance(value, Sequence)
    return [tensor for part in value for tensor in flatten(part)]


def run(
    op: Callable, tensors: dict[str, Tensor], frozen: Sequence[str] = (), dtype: torch.dtype | None = None
) -> dict[str, Tensor | None]:
    """Results of `op(**tensors)` and the gradients of all tensors except `frozen`, for a fixed random loss.

    dtype: what the loss's coefficients are rounded to, so that it is the same loss for tensors of a wider one.
    """
    leaves = {name: t.detach().clone().requires_grad_(name not in frozen) for name, t in tensors.items()}
    results = flatten(op(**leaves))
    grads = [random(*result.shape, dtype=dtype or result.dtype, seed=9 + i).to(result.dtype)
             for i, result in enumerate(results)]  # fmt: skip
    trained = [(result, grad) for result, grad in zip(results, grads, strict=True) if result.requires_grad]
    torch.autograd.backward(*zip(*trained, strict=True))
    outcome: dict[str, Tensor | None] = {f"result {i}": result.detach() for i, result in enumerate(results)}
    return outcome | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}


def assert_as_good_as_plain(
    op: Callable, tensors: dict[str, Tensor], backend: str | None = None, frozen: Sequence[str] = ()
) -> None:
    """`op(backend, **tensors)` is at most twice as far from the float64 reference as plain PyTorch in its dtype."""
    dtype = next(iter(tensors.values())).dtype
    exact = run(lambda **t: op("reference", **t), {name: t.double() for name, t in tensors.items()}, frozen, dtype)
    plain = run(lambda **t: op("reference", **t), tensors, frozen)
    ours = run(lambda **t: op(backend, **t), tensors, frozen)
    assert ours.keys() == exact.keys()
    for name, target in exact.items():
        result, other = ours[name], plain[name]
        if target is None:
            assert result is None, f"{name} was computed for nothing"
        else:
            assert result is not None and other is not None, name
            assert_close_as_plain(result, other, target, name)


def assert_close_as_plain(ours: Tensor, plain: Tensor, exact: Tensor, name: str) -> None:
    """Largest and root-mean-square error at most twice the plain path's, above a floor.

    The floor: half a rounding of the values (float32: four, sums take other orders), and a fraction of one of a number
    of size 1, as the tests' inputs are: what is exactly zero for the plain path may be a difference of equal sums here.
    """
    assert ours.shape == exact.shape and ours.dtype == plain.dtype, name
    if exact.numel() == 0:
        return
    eps = torch.finfo(ours.dtype).eps
    num_roundings, offset = (4, 1) if ours.dtype == torch.float32 else (1 / 2, 1 / 16)
    for kind, size in (("largest", lambda t: t.abs().max()), ("rms", lambda t: t.square().mean().sqrt())):
        error, plain_error = (size(t.double() - exact).item() for t in (ours, plain))
        floor = eps * (num_roundings * size(exact).item() + offset)
        assert error <= 2 * plain_error + floor, f"{name}: {kind} error {error:.3g}, plain PyTorch's {plain_error:.3g}"


def skip_unless_it_runs(
    kernel: str, layout: lk.TokenLayout, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int,
    needs_grad: bool = True,
) -> None:  # fmt: skip
    """Skip, with the reason, if the attention kernel cannot run this case here."""
    try:
        dispatch.choose_kernel(
            kernel, layout, device=torch.device(DEVICE), dtype=dtype, num_heads=num_heads, num_kv_heads=num_kv_heads,
            head_dim=head_dim, needs_grad=needs_grad,
        )  # fmt: skip
    except ValueError as reason:
        pytest.skip(str(reason))


def rope_of(layout: lk.TokenLayout, head_dim: int) -> tuple[Tensor, Tensor]:
    inv_freq = 1e4 ** -torch.linspace(0, 1, head_dim // 2)
    return lk.rope_tables(layout.position, inv_freq.to(layout.device))


def make_block(dtype: torch.dtype = torch.float32, **options: object) -> lk.RoutedBlock:
    """A block with 4 query and 2 key-value heads of 64 in which every weight has an effect."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    torch.manual_seed(0)
    block = lk.RoutedBlock(**{**sizes, "frozen_text": True, **options})
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return block.to(DEVICE, dtype)


def block_inputs(layout: lk.TokenLayout, dtype: torch.dtype, width: int = 128, seed: int = 1) -> tuple:
    """The pair of rows (text, image) and rope."""
    rows = random(layout.num_text, 128, dtype=dtype, seed=seed), random(layout.num_image, width, dtype=dtype, seed=2)
    return rows, rope_of(layout, 64)


def run_block(
    block: lk.RoutedBlock, rows: tuple[Tensor, Tensor], layout: lk.TokenLayout, rope: tuple,
    call: Callable | None = None, loss_dtype: torch.dtype | None = None, **options: object,
) -> dict[str, Tensor | None]:  # fmt: skip
    """By name: outputs, and gradients of everything trainable, for a fixed random loss on the active rows.

    call: `block` in another form. loss_dtype: as `dtype` of `run`.
    """
    x = [t.detach().clone().requires_grad_() for t in rows]
    trained = {name: p for name, p in block.named_parameters() if p.requires_grad}
    y_text, y_image = (block if call is None else call)((x[0], x[1]), layout, rope, **options)
    parts = [y_text[layout.num_constant :], y_image]
    weights = [random(*part.shape, dtype=loss_dtype or part.dtype, seed=5 + i).to(part.dtype)
               for i, part in enumerate(parts)]  # fmt: skip
    inputs = [*x, *trained.values()]
    grads = torch.autograd.grad(parts, inputs, weights, allow_unused=True)
    named = dict(zip(["x_text", "x_image", *trained], grads, strict=True))
    return {"y_text": y_text.detach(), "y_image": y_image.detach(), **named}


def assert_same_bits(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if tensor is None:
            assert other[name] is None, name
        else:
            assert torch.equal(tensor, other[name]), f"{name} has other bits"


def clone_layout(layout: lk.TokenLayout) -> lk.TokenLayout:
    """The same layout in memory of its own, to be overwritten."""
    return layout.with_vectors({name: vector.clone() for name, vector in layout.vectors.items()})


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Any wait for the device inside is an error."""
    if not ON_GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Returns a function that gives the peak growth of allocated memory in bytes; 0 on a CPU."""
    if not ON_GPU:
        yield lambda: 0
        return
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield lambda: torch.cuda.max_memory_allocated() - before


def capture(function: Callable[[], object]) -> Callable[[], None]:
    """Capture `function` in a CUDA graph, after three warm-up runs on a side stream; the result replays it.

    On a CPU the result calls `function`.
    """
    if not ON_GPU:
        return lambda: (function(), None)[1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
