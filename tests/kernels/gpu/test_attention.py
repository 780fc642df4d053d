"""Every attention kernel that runs here agrees with the float64 reference, forward and backward.

Up to 131,072 tokens: there the reference is computed for a few queries at a time, to bound memory.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import lmfusion_kernels as lk
from lmfusion_kernels.attention import dispatch
from tests.kernels.gpu.support import (
    DEVICE,
    DOCUMENTS,
    DTYPES,
    ON_GPU,
    assert_as_good_as_plain,
    assert_close_as_plain,
    make_layout,
    peak_memory,
    random,
    run,
    skip_unless_it_runs,
)

KERNELS = [name for name in dispatch.KERNELS if name not in ("reference", "flex")]
"""Flex compiles seconds for every case, so it has a test of few cases."""
HEADS = [(4, 4), (6, 2), (7, 1)]
HEAD_DIMS = [40, 64, 96, 128, 256]


def attend(layout: lk.TokenLayout, scale: float | None = None):
    return lambda backend, q, k, v: lk.hybrid_attention(q, k, v, layout, scale, backend)


def make_qkv(layout: lk.TokenLayout, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int):
    shapes = {"q": (layout.num_tokens, num_heads), "k": (layout.num_keys, num_kv_heads)}
    shapes["v"] = shapes["k"]
    return {name: random(*shape, head_dim, dtype=dtype, seed=i) for i, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_head_sizes_and_dtypes(kernel, dtype, head_dim):
    layout = make_layout("mixed")
    skip_unless_it_runs(kernel, layout, dtype, 6, 2, head_dim)
    assert_as_good_as_plain(attend(layout), make_qkv(layout, dtype, 6, 2, head_dim), kernel)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_flex(head_dim):
    layout = make_layout("mixed")
    skip_unless_it_runs("flex", layout, torch.bfloat16, 6, 2, head_dim)
    assert_as_good_as_plain(attend(layout), make_qkv(layout, torch.bfloat16, 6, 2, head_dim), "flex")


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_layouts_and_groups_of_heads(kernel, num_heads, num_kv_heads, name):
    layout = make_layout(name)
    skip_unless_it_runs(kernel, layout, torch.bfloat16, num_heads, num_kv_heads, 64)
    qkv = make_qkv(layout, torch.bfloat16, num_heads, num_kv_heads, 64)
    assert_as_good_as_plain(attend(layout, scale=0.3), qkv, kernel)


HIDDEN = [("text", 300), ("image", 400, "hidden"), ("image", 400), ("text", 150), ("image", 150, "hidden")]
"""Long enough for tiles of every kind: skipped, whole and masked."""


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [*KERNELS, "flex"])
def test_hidden_spans(kernel, dtype, head_dim):
    layout = lk.TokenLayout.from_spans([HIDDEN, HIDDEN[1:3]], device=DEVICE)
    skip_unless_it_runs(kernel, layout, dtype, 4, 2, head_dim)
    assert_as_good_as_plain(attend(layout), make_qkv(layout, dtype, 4, 2, head_dim), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_scores_do_not_overflow(kernel):
    layout = make_layout("mixed")
    skip_unless_it_runs(kernel, layout, torch.bfloat16, 4, 2, 64)
    qkv = make_qkv(layout, torch.bfloat16, 4, 2, 64)
    qkv["q"] *= 60
    exact = attend(layout)("reference", **{name: t.double() for name, t in qkv.items()})
    ours = run(lambda **t: attend(layout)(kernel, **t), qkv)
    assert_close_as_plain(ours["result 0"], exact.bfloat16(), exact, "out")
    assert all(tensor.isfinite().all() for tensor in ours.values())


@pytest.mark.parametrize("frozen", [["q"], ["k", "v"], ["q", "k"]], ids=" ".join)
@pytest.mark.parametrize("kernel", KERNELS)
def test_some_inputs_without_gradient(kernel, frozen):
    layout = make_layout("mixed")
    skip_unless_it_runs(kernel, layout, torch.bfloat16, 4, 2, 64)
    assert_as_good_as_plain(attend(layout), make_qkv(layout, torch.bfloat16, 4, 2, 64), kernel, frozen)


CACHED = {
    "one token a document": ([[("text", 1)]] * 3, [5000, 0, 17], [0, 5001, 10_002], 15_003),
    "many and few": ([[("text", 1)], [("image", 40), ("text", 1)], [("text", 5)]], [300, 0, 17], [20, 330, 700], 800),
    "a denoising step": ([[("image", 256)]] * 2, [77, 3], [1000, 1333], 3000),
    "padding": ([[("text", 1)]] * 4, [90, 0, 0, 0], [0, 999, 999, 999], 1000),
}


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(8, 2, 128), (7, 1, 64), (3, 3, 96), (32, 2, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_fewer_queries_than_keys(kernel, dtype, num_heads, num_kv_heads, head_dim, name):
    """Unused slots of the cache may hold any finite values."""
    documents, lengths, starts, num_rows = CACHED[name]
    layout = lk.TokenLayout.from_spans(
        documents, cached_lengths=lengths, cache_starts=starts, cache_slots=num_rows, device=DEVICE
    )
    skip_unless_it_runs(kernel, layout, dtype, num_heads, num_kv_heads, head_dim, needs_grad=False)
    tensors = make_qkv(layout, dtype, num_heads, num_kv_heads, head_dim)
    seen = torch.zeros(layout.num_keys, dtype=torch.bool, device=DEVICE)
    for start, end in zip(layout.key_start.tolist(), layout.key_end.tolist(), strict=True):
        seen[start:end] = True
    with torch.no_grad():
        exact = lk.hybrid_attention(*(t.double() for t in tensors.values()), layout, backend="reference")
        plain = lk.hybrid_attention(**tensors, layout=layout, backend="reference")
        tensors["k"][~seen] = tensors["v"][~seen] = 1e3
        ours = lk.hybrid_attention(**tensors, layout=layout, backend=kernel)
    assert_close_as_plain(ours, plain, exact, "out")


@pytest.fixture
def strictly_deterministic() -> Iterator[None]:
    """tests/conftest.py only asks for a warning, which kernels with atomics ignore."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.mark.usefixtures("strictly_deterministic")
@pytest.mark.parametrize("kernel", KERNELS)
def test_same_bits_every_time(kernel):
    layout = make_layout("mixed")
    skip_unless_it_runs(kernel, layout, torch.bfloat16, 8, 2, 128)
    qkv = make_qkv(layout, torch.bfloat16, 8, 2, 128)
    first = run(lambda **t: attend(layout)(kernel, **t), qkv)
    for _ in range(49):
        again = run(lambda **t: attend(layout)(kernel, **t), qkv)
        assert all(torch.equal(first[name], again[name]) for name in first)


# Long batches


LONG = 131_072 if ON_GPU else 5_120
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 1, 128
CHUNK = 256


def long_documents(kind: str) -> list:
    if kind == "causal":
        return [[("text", LONG)]]
    if kind == "one image":
        return [[("text", 7), ("image", LONG // 8)]]
    unit = [("text", 60), ("marker", 1), ("image", 193), ("marker", 1), ("text", 1)]
    return [unit * (1 + d % 4) for d in range(LONG // 2560 * 4)]  # 256 to 1,024 tokens, 640 on average


def attend_to_chunk(q: Tensor, k: Tensor, v: Tensor, layout: lk.TokenLayout, first: int, last: int) -> Tensor:
    """Rows [first, last) of the result, computed from only the keys that they see."""
    start, end = int(layout.key_start[first]), int(layout.key_end[last - 1])
    key = torch.arange(start, end, device=DEVICE)
    visible = (key >= layout.key_start[first:last, None]) & (key < layout.key_end[first:last, None])
    group = q.shape[1] // k.shape[1]
    keys, values = (t[start:end].repeat_interleave(group, dim=1) for t in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q[first:last], keys) * HEAD_DIM**-0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hnm,mhd->nhd", weights, values)


@pytest.mark.parametrize("kind", ["causal", "packed", "one image"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_long_batches_within_bounded_memory(kernel, kind):
    layout = lk.TokenLayout.from_spans(long_documents(kind), device=DEVICE)
    skip_unless_it_runs(kernel, layout, torch.bfloat16, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM)
    tensors = make_qkv(layout, torch.bfloat16, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM)
    leaves = [t.requires_grad_() for t in tensors.values()]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    num_tokens = layout.num_tokens
    for first in (0, num_tokens // 2 - 3, num_tokens - CHUNK):
        chosen = slice(first, first + CHUNK)
        dout = torch.zeros_like(leaves[0])
        dout[chosen] = random(CHUNK, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16, seed=9)
        with peak_memory() as peak:
            out = lk.hybrid_attention(*leaves, layout, backend=kernel)
            grads = torch.autograd.grad(out, leaves, dout)
        # A few tensors of the size of q; scores of all pairs, even as bits, would be 2 GB at 131,072 causal tokens.
        assert peak() <= 12 * leaves[0].nbytes, f"{peak() / 2**20:.0f} MiB"
        exact = attend_to_chunk(*wide, layout, first, first + CHUNK)
        exact_grads = torch.autograd.grad(exact, wide, dout[chosen].double())
        plain = exact.to(out.dtype)  # the best a result in this dtype can be
        assert_close_as_plain(out[chosen].detach(), plain.detach(), exact.detach(), f"out from {first}")
        for name, grad, target in zip(tensors, grads, exact_grads, strict=True):
            assert_close_as_plain(grad, target.to(grad.dtype), target, f"d{name} from {first}")
