"""Derivatives of every op: forward mode, second derivatives and torch.func are right or raise."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import lmfusion_kernels as lk
from lmfusion_kernels.ops.swiglu import swiglu
from tests.kernels.ops.row_ops import needs_native

pytestmark = needs_native

LAYOUT = lk.TokenLayout.from_spans(
    [[("text", 3), ("image", 4), ("text", 2)], [("image", 2), ("text", 1)]], frozen_text=False
)
N = LAYOUT.num_tokens
ROPE = lk.rope_tables(LAYOUT.position, torch.tensor([1.0, 0.3, 0.1, 0.01]))


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_block(dtype=torch.float32, backend=None, **options):
    torch.manual_seed(0)
    block = lk.RoutedBlock(8, 12, 2, 1, 8, **options).to(dtype)
    return partial(block, backend=backend)


def make_ops(dtype=torch.float32, backend=None) -> dict:
    """Each op as a function of one tensor [N, 8]: the rows, or a weight made of them."""
    norm, square, gate_up, wide = (normal(*s, dtype=dtype) for s in ((8,), (8, 8), (24, 8), (32, 8)))
    down, x, both = normal(8, 12, dtype=dtype), normal(N, 8, seed=1, dtype=dtype), {"backend": backend}
    block = make_block(dtype, backend)
    options = {"layout": LAYOUT, **both}

    def attend(x):
        return lk.hybrid_attention(x[:, None].tile(1, 2, 1), x[:, None], x[:, None], **options).flatten(1)

    return {
        "rms_norm": lambda x: lk.routed_rms_norm(x, norm, norm, LAYOUT, 1e-6, **both),
        "rms_norm with residual": lambda r: sum(lk.routed_rms_norm(x, norm, norm, LAYOUT, 1e-6, r, **both)),
        "rms_norm, image weight": lambda w: lk.routed_rms_norm(x, norm, w[0], LAYOUT, 1e-6, **both),
        "linear": lambda x: lk.routed_linear(x, square, square, **options),
        "linear, image bias": lambda b: lk.routed_linear(x, square, square, image_bias=b[0], **options),
        "rope_reorder": lambda x: torch.cat([t.flatten(1) for t in lk.rope_reorder(
            x @ wide.t(), LAYOUT, ROPE, 2, **both)], 1),
        "rope_reorder, norm": lambda w: lk.rope_reorder(x @ wide.t(), LAYOUT, ROPE, 2, w[0], **both)[0].flatten(1),
        "swiglu": lambda x: swiglu(x, **both),
        "routed_swiglu": lambda x: lk.routed_swiglu(x, gate_up, down, gate_up, down, **options),
        "attention": attend,
        "block": lambda x: block(x, LAYOUT, ROPE),
        "block of a pair": lambda x: torch.cat(block((x[: LAYOUT.num_text], x[LAYOUT.num_text :]), LAYOUT, ROPE)),
        "block in sequence order": lambda x: block(x, LAYOUT, ROPE, order="sequence"),
    }  # fmt: skip


NAMES = list(make_ops())
LINEAR = ("linear", "linear, image bias")
REFUSED = "no forward-mode derivative .*pass backend='reference'"


def dual(op, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(op(forward_ad.make_dual(x, tangent))).tangent


FORWARD_MODE = {
    "jvp": lambda op, x: jvp(op, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda op, x: jacfwd(op)(x),
    "hessian": lambda op, x: hessian(lambda x: op(x).square().sum())(x),
    "forward_ad": lambda op, x: dual(op, x, torch.ones_like(x)),
    "forward_ad without gradients": torch.no_grad()(lambda op, x: dual(op, x, torch.ones_like(x))),
    "linearize": lambda op, x: torch.func.linearize(op, x)[1](torch.ones_like(x)),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", FORWARD_MODE)
@pytest.mark.parametrize("backend", [None, "native"])
def test_forward_mode_is_refused(name, how, backend):
    with pytest.raises(RuntimeError, match=REFUSED):
        FORWARD_MODE[how](make_ops(backend=backend)[name], normal(N, 8, seed=2))


def test_forward_mode_through_rope_tables_is_refused():
    x = normal(N, 32)
    with pytest.raises(RuntimeError, match=REFUSED):
        jvp(lambda cos: lk.rope_reorder(x, LAYOUT, (cos, ROPE.sin), 2)[0], (ROPE.cos,), (ROPE.cos,))


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_of_the_reference(name):
    """Against central differences in float64."""
    op = make_ops(torch.float64, "reference")[name]
    x, tangent, step = (normal(N, 8, seed=seed, dtype=torch.float64) for seed in (2, 3, 4))
    step = 1e-5
    expected = (op(x + step * tangent) - op(x - step * tangent)) / (2 * step)
    assert expected.abs().max() > 1e-3
    for actual in (jvp(op, (x,), (tangent,))[1], dual(op, x, tangent)):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_ops_beside_a_forward_mode_derivative_run():
    """Tensors without a tangent need no derivative."""
    x, op = normal(N, 8), make_ops()["block"]
    with forward_ad.dual_level():
        assert torch.equal(op(x), make_ops()["block"](x))
    _, tangent = jvp(lambda t: t * op(x).sum(), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, op(x).sum().expand(N, 8))


def test_reordering_knows_all_derivatives():
    x, tangent = normal(N, 2, 4), normal(N, 2, 4, seed=1)
    for op in (LAYOUT.to_tower_order, LAYOUT.to_sequence_order):
        assert torch.equal(jvp(op, (x,), (tangent,))[1], op(tangent))
        assert torch.equal(dual(op, x, tangent), op(tangent))
        assert torch.equal(vmap(op, in_dims=1, out_dims=1)(x), op(x))


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_refused(name):
    """Except the linear map, whose second derivative is PyTorch's own."""
    op, x = make_ops()[name], normal(N, 8, seed=2).requires_grad_()
    (first,) = torch.autograd.grad(op(x).square().sum(), x, create_graph=True)
    if name in LINEAR:
        exact_op, exact_x = make_ops(torch.float64, "reference")[name], x.detach().double().requires_grad_()
        (exact,) = torch.autograd.grad(exact_op(exact_x).square().sum(), exact_x, create_graph=True)
        actual, expected = (torch.autograd.grad(f.square().sum(), y)[0] for f, y in ((first, x), (exact, exact_x)))
        torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-3)
        return
    for allow_unused in (False, True):
        with pytest.raises(RuntimeError, match="no second derivative; backend='reference' has"):
            torch.autograd.grad(first.square().sum(), x, allow_unused=allow_unused, retain_graph=True)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("trained", ["rows", "weights", "both"])
def test_second_derivatives_of_the_block_are_refused(trained, paired):
    """However they are linked to the inputs: through a loss linear in the output, or with all weights frozen."""
    op = make_block()
    op.func.requires_grad_(trained != "rows")
    x = normal(N, 8).requires_grad_(trained != "weights")
    leaves = [x] if trained != "weights" else []
    leaves += list(op.func.image.parameters()) if trained != "rows" else []
    rows = (x[: LAYOUT.num_text], x[LAYOUT.num_text :]) if paired else x
    y = op(rows, LAYOUT, ROPE)
    loss = sum(t.sum() for t in y) if paired else y.sum()
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    for leaf in leaves:
        with pytest.raises(RuntimeError, match="routed_block of the native backend has no second derivative"):
            torch.autograd.grad(sum(g.sum() for g in grads), leaf, allow_unused=True, retain_graph=True)


def test_gradients_with_a_graph_are_the_same_numbers():
    for name, op in make_ops().items():
        x = normal(N, 8, seed=2).requires_grad_()
        plain, with_graph = (
            torch.autograd.grad(op(x).square().sum(), x, create_graph=create)[0] for create in (False, True)
        )
        assert torch.equal(plain, with_graph), name


@pytest.mark.parametrize("name", NAMES)
def test_transforms_of_the_reverse_mode_and_vmap(name):
    op, x = make_ops()[name], normal(N, 8, seed=2)
    leaf = x.clone().requires_grad_()
    y = op(leaf)
    (expected,) = torch.autograd.grad(y.square().sum(), leaf)

    def assert_close(actual, target):
        torch.testing.assert_close(actual, target, rtol=1e-4, atol=1e-4)

    assert_close(grad(lambda x: op(x).square().sum())(x), expected)
    assert_close(vjp(op, x)[1](2 * y.detach())[0], expected)
    assert_close((jacrev(op)(x) * 2 * y.detach()[..., None, None]).sum((0, 1)), expected)
    assert_close(vmap(op)(torch.stack([x, 2 * x])), torch.stack([op(x), op(2 * x)]))
    each = vmap(grad(lambda x: op(x).square().sum()))(torch.stack([x, x]))
    assert_close(each, torch.stack([expected, expected]))


@pytest.mark.parametrize("name", NAMES)
def test_native_ops_that_are_asked_for_inside_a_transform(name):
    op = make_ops(backend="native")[name]
    with pytest.raises(ValueError, match=r"asked for, but it does not run inside torch\.func's transforms; backend='r"):
        grad(lambda x: op(x).sum())(normal(N, 8))


def test_gradients_of_parameters_by_functional_call():
    block, x = make_block().func, normal(N, 8)
    parameters = dict(block.named_parameters())
    expected = torch.autograd.grad(block(x, LAYOUT, ROPE).square().sum(), list(parameters.values()))

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(block, parameters, (x, LAYOUT, ROPE)).square().sum()

    detached = {name: p.detach() for name, p in parameters.items()}
    torch.testing.assert_close(tuple(grad(loss)(detached).values()), expected, rtol=1e-4, atol=1e-4)
    leaves = {name: p.requires_grad_() for name, p in detached.items()}
    assert all(map(torch.equal, torch.autograd.grad(loss(leaves), list(leaves.values())), expected))


@pytest.mark.parametrize("name", ["rms_norm", "attention", "block"])
def test_compiled_transforms(name):
    op, x = make_ops()[name], normal(N, 8)
    torch._dynamo.reset()
    compiled = torch.compile(grad(lambda x: op(x).square().sum()), backend="aot_eager")
    torch.testing.assert_close(compiled(x), grad(lambda x: op(x).square().sum())(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.compile(lambda x: jvp(op, (x,), (x,))[1], backend="aot_eager")(x)
    with pytest.raises(RuntimeError, match=REFUSED):
        jvp(torch.compile(op, backend="aot_eager"), (x,), (x,))
