"""The row ops on the GPU agree with the float64 reference in every dtype, at odd widths, and with empty towers.

Memory is poisoned with NaN (tests/conftest.py), so a row that a kernel leaves out is detected.
"""

import pytest
import torch

import lmfusion_kernels as lk
from lmfusion_kernels.ops.swiglu import swiglu
from lmfusion_kernels.runtime import backends
from tests.kernels.gpu.support import (
    DEVICE,
    DOCUMENTS,
    DTYPES,
    ON_GPU,
    assert_as_good_as_plain,
    assert_close_as_plain,
    make_layout,
    random,
    rope_of,
)
from tests.kernels.ops import test_swiglu_extremes as extremes

EPS = 1e-5
WIDTHS = [1, 7, 64, 96, 1000, 4096, 5120]
"""Rows of a few bytes, rows whose starts are not multiples of 16 bytes, and widths of real models."""


@pytest.mark.skipif(not ON_GPU, reason="on a CPU float16 is left to plain PyTorch")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_ops_are_chosen(dtype):
    assert backends.choose(None, torch.empty(0, 8, device=DEVICE, dtype=dtype)) == "native"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_rms_norm(dtype, width, residual):
    layout = make_layout("mixed")
    shape = (layout.num_tokens, width)
    tensors = {"x": random(*shape, dtype=dtype)}
    if residual:
        tensors["residual"] = random(*shape, dtype=dtype, seed=1)
    tensors |= {f"{tower}_weight": random(width, dtype=dtype, seed=2) for tower in ("text", "image")}
    assert_as_good_as_plain(lambda b, **t: lk.routed_rms_norm(**t, layout=layout, eps=EPS, backend=b), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_rms_norm_of_every_layout(dtype, name):
    layout = make_layout(name)

    def op(backend, text, image, text_weight, image_weight):
        return lk.routed_rms_norm((text, image), text_weight, image_weight, layout, EPS, backend=backend)

    tensors = {
        "text": random(layout.num_text, 96, dtype=dtype),
        "image": random(layout.num_image, 40, dtype=dtype, seed=1),
        "text_weight": random(96, dtype=dtype, seed=2),
        "image_weight": random(40, dtype=dtype, seed=3),
    }
    assert_as_good_as_plain(op, tensors)
    assert_as_good_as_plain(op, tensors, frozen=["text_weight"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu(dtype, width):
    tensors = {"gate_up": random(77, 2 * width, dtype=dtype, scale=3.0)}
    assert_as_good_as_plain(lambda b, gate_up: swiglu(gate_up, backend=b), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_at_gates_of_every_kind(dtype):
    """The special function unit returns 0 for small results of exp2 and reciprocal, which must have no effect."""
    if dtype == torch.float16 and not ON_GPU:
        pytest.skip("on a CPU float16 is left to plain PyTorch")
    every = extremes.float32_gates(1 << 16) if dtype == torch.float32 else extremes.every_16_bit_gate(dtype)
    extremes.assert_equals_torch(extremes.native, extremes.native_backward, every.to(DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("widths", [(48, 48), (40, 56)], ids=["joined", "apart"])
def test_routed_swiglu_of_every_layout(dtype, name, widths):
    layout = make_layout(name)
    tensors = {"x": random(layout.num_tokens, 64, dtype=dtype)}
    for i, (tower, width) in enumerate(zip(("text", "image"), widths, strict=True)):
        tensors[f"{tower}_gate_up"] = random(2 * width, 64, dtype=dtype, seed=2 + i, scale=0.2)
        tensors[f"{tower}_down"] = random(64, width, dtype=dtype, seed=4 + i, scale=0.2)
    assert_as_good_as_plain(lambda b, **t: lk.routed_swiglu(**t, layout=layout, backend=b), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_routed_linear(dtype, name):
    layout = make_layout(name)
    tensors = {"x": random(layout.num_tokens, 64, dtype=dtype)}
    for i, tower in enumerate(("text", "image")):
        tensors[f"{tower}_weight"] = random(40, 64, dtype=dtype, seed=2 + i, scale=0.2)
        tensors[f"{tower}_bias"] = random(40, dtype=dtype, seed=4 + i)
    assert_as_good_as_plain(lambda b, **t: lk.routed_linear(**t, layout=layout, backend=b), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 16, 64, 96, 128, 256])
@pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
def test_rope_reorder(dtype, head_dim, norms):
    layout = make_layout("mixed")
    rope, num_heads, num_kv_heads = rope_of(layout, head_dim), 6, 2
    tensors = {"qkv": random(layout.num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)}
    if norms:
        for i, name in enumerate(("text_q_norm", "text_k_norm", "image_q_norm", "image_k_norm")):
            tensors[name] = random(head_dim, dtype=dtype, seed=2 + i)

    def op(backend, qkv, **norms):
        return lk.rope_reorder(qkv, layout, rope, num_heads, **norms, eps=EPS, backend=backend)

    assert_as_good_as_plain(op, tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_rope_reorder_of_every_layout(dtype, name):
    layout = make_layout(name)
    rope = rope_of(layout, 32)

    def op(backend, text, image):
        return lk.rope_reorder((text, image), layout, rope, 3, backend=backend)

    rows = {"text": layout.num_text, "image": layout.num_image}
    assert_as_good_as_plain(op, {tower: random(count, 5 * 32, dtype=dtype) for tower, count in rows.items()})


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (96,), (3, 64)], ids=str)
def test_orders_are_permutations_of_rows(dtype, shape):
    layout = make_layout("mixed")
    x = random(layout.num_tokens, *shape, scale=50.0).to(dtype)
    tower = layout.to_tower_order(x)
    assert torch.equal(tower, x[layout.tower_to_sequence.long()])
    assert torch.equal(layout.to_sequence_order(tower), x)
    if dtype.is_floating_point:
        x.requires_grad_()
        layout.to_tower_order(x).backward(tower)
        assert torch.equal(x.grad, x)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_orders_of_every_layout(name):
    layout = make_layout(name)
    x = random(layout.num_tokens, 24)
    assert torch.equal(layout.to_sequence_order(layout.to_tower_order(x)), x)


@pytest.mark.parametrize("offset", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_do_not_start_at_16_bytes(dtype, offset):
    """A view into a larger buffer may have any alignment."""
    layout = make_layout("mixed")
    weight = random(64, dtype=dtype, seed=2)
    aligned = random(layout.num_tokens, 64, dtype=dtype)
    buffer = torch.empty(aligned.numel() + offset, dtype=dtype, device=DEVICE)
    moved = buffer[offset:].view_as(aligned).copy_(aligned)
    expected = lk.routed_rms_norm(aligned, weight, weight, layout, EPS)
    assert torch.equal(lk.routed_rms_norm(moved, weight, weight, layout, EPS), expected)


@pytest.mark.parametrize("width", [32_768, 32_767], ids=["packs", "elements"])
@pytest.mark.parametrize("op", ["rms_norm", "swiglu", "reorder_rows"])
def test_rows_beyond_two_to_the_31_elements(op, width):
    """Addresses need 64 bits: 70,000 rows of 32,767 are 2.3e9 elements. Only the last rows differ from the others."""
    num_rows = 70_000 if ON_GPU else 70
    if ON_GPU and torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    x = torch.ones(num_rows, 2 * width if op == "swiglu" else width, dtype=torch.bfloat16, device=DEVICE)
    x[-3:] = random(3, x.shape[1], dtype=torch.bfloat16)
    last = x[-3:].clone()
    if op == "reorder_rows":
        reversed_rows = torch.arange(num_rows - 1, -1, -1, dtype=torch.int32, device=DEVICE)
        y = torch.ops.lmfusion.reorder_rows(x, reversed_rows, reversed_rows)
        assert torch.equal(y[:3], last.flip(0)) and y[-3:].eq(1).all()
        assert torch.equal(torch.ops.lmfusion.reorder_rows(y, reversed_rows, reversed_rows)[-3:], last)
        return
    if op == "rms_norm":
        layout = lk.TokenLayout.from_spans([[("image", num_rows)]], device=DEVICE)
        weight = random(width, dtype=torch.bfloat16, seed=1)
        y = lk.routed_rms_norm(x, weight, weight, layout, EPS)
        exact, plain = (lk.reference.rms_norm(t, weight.to(t.dtype), EPS) for t in (last.double(), last))
    else:
        y = swiglu(x)
        exact, plain = lk.reference.swiglu(last.double()), lk.reference.swiglu(last)
    assert_close_as_plain(y[-3:], plain, exact, "last rows")
