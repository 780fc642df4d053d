"""Graphs of blocks and single ops by torch.export, AOTInductor and make_fx give the same numbers."""

import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import lmfusion_kernels as lk
from lmfusion_kernels.ops.swiglu import swiglu
from tests.kernels.layout.test_token_layout import assert_equal_layouts
from tests.kernels.ops.row_ops import needs_native

pytestmark = needs_native

DOCUMENTS = [[("text", 4), ("image", 6), ("text", 2)], [("image", 3), ("text", 3)]]
OTHERS = [
    [[("text", 9), ("image", 16), ("text", 1)], [("image", 3), ("text", 3)], [("text", 4)]],
    [[("text", 1)]],
    [[("image", 2)]],
    [[("text", 30), ("image", 9)]] * 5,
    [[("image", 1), ("text", 1)]],
]
WIDTH = 16


def make_inputs(documents, frozen_text=True, paired=False):
    layout = lk.TokenLayout.from_spans(documents, frozen_text=frozen_text)
    x = torch.randn(layout.num_tokens, WIDTH, generator=torch.Generator().manual_seed(1))
    rope = lk.rope_tables(layout.position, torch.tensor([1.0, 0.3, 0.1, 0.01]))
    return ((x[: layout.num_text], x[layout.num_text :]) if paired else x), layout, rope


class Block(nn.Module):
    """Two blocks, in one order."""

    def __init__(self, order="tower", **options):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(lk.RoutedBlock(WIDTH, 24, 2, 1, 8, **options) for _ in range(2))
        self.order = order

    def forward(self, x, layout, rope):
        for layer in self.layers:
            x = layer(x, layout, rope, order=self.order)
        return x


class Op(nn.Module):
    """One op, with weights as parameters."""

    def __init__(self, name):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        shapes = {
            "norm": (WIDTH,),
            "square": (WIDTH, WIDTH),
            "bias": (WIDTH,),
            "gate_up": (48, WIDTH),
            "down": (WIDTH, 24),
        }
        shapes |= {"qkv": (32, WIDTH), "head": (8,)}
        self.weights = nn.ParameterDict({n: torch.randn(*s, generator=generator) for n, s in shapes.items()})
        self.name = name

    def forward(self, x, layout, rope):
        w = self.weights
        if self.name == "rms_norm":
            return lk.routed_rms_norm(x, w["norm"], w["norm"], layout, 1e-6)
        if self.name == "rms_norm with residual":
            return lk.routed_rms_norm(x, w["norm"], w["norm"], layout, 1e-6, residual=2 * x)
        if self.name == "rms_norm of a pair":
            rows = (x[: layout.num_text], x[layout.num_text :])
            return lk.routed_rms_norm(rows, w["norm"], w["norm"], layout, 1e-6)
        if self.name == "linear":
            return lk.routed_linear(x, w["square"], w["square"], layout)
        if self.name == "linear with bias":
            return lk.routed_linear(x, w["square"], w["square"], layout, w["bias"], w["bias"])
        if self.name == "rope_reorder":
            return lk.rope_reorder(lk.routed_linear(x, w["qkv"], w["qkv"], layout), layout, rope, 2)
        if self.name == "rope_reorder with norms":
            qkv = lk.routed_linear(x, w["qkv"], w["qkv"], layout)
            return lk.rope_reorder(qkv, layout, rope, 2, *[w["head"]] * 4)
        if self.name == "swiglu":
            return swiglu(x)
        if self.name == "routed_swiglu":
            return lk.routed_swiglu(x, w["gate_up"], w["down"], w["gate_up"], w["down"], layout)
        if self.name == "attention":
            q = x.unflatten(1, (2, 8))
            return lk.hybrid_attention(q, q[:, :1], q[:, 1:], layout)
        return layout.to_sequence_order(layout.to_tower_order(x) * 2)


OPS = (
    "rms_norm", "rms_norm with residual", "rms_norm of a pair", "linear", "linear with bias", "rope_reorder",
    "rope_reorder with norms", "swiglu", "routed_swiglu", "attention", "reordering",
)  # fmt: skip
BLOCKS = {
    "tower": {},
    "sequence": {"order": "sequence"},
    "all at once": {"order": "sequence", "qkv_bias": True, "qk_norm": True},
    "narrow": {"image_hidden_size": 8},
    "shared": {"separation": "shallow"},
}


def save_and_load(program, path):
    torch.export.save(program, path)
    return torch.export.load(path)


def assert_same(actual, expected):
    for value, target in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(value, target)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("frozen_text", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_exported_block(name, frozen_text, strict, tmp_path):
    options = BLOCKS[name]
    block = Block(frozen_text=frozen_text, **options)
    x, layout, rope = make_inputs(DOCUMENTS, frozen_text, paired=name == "narrow")
    if name == "narrow":
        x = (x[0], x[1][:, :8].contiguous())
    program = save_and_load(torch.export.export(block, (x, layout, rope), strict=strict), tmp_path / "block.pt2")
    assert_same(program.module()(x, layout, rope), block(x, layout, rope))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_exported_op(name, strict, tmp_path):
    op, inputs = Op(name), make_inputs(DOCUMENTS)
    program = save_and_load(torch.export.export(op, inputs, strict=strict), tmp_path / "op.pt2")
    assert_same(program.module()(*inputs), op(*inputs))


def dynamic(inputs):
    """As in docs/kernels.md: every size and every count may vary."""

    def free(leaf):
        return None if isinstance(leaf, bool) else {0: Dim.AUTO} if isinstance(leaf, torch.Tensor) else Dim.AUTO

    return tuple(
        free(value) if isinstance(value, torch.Tensor) else [free(leaf) for leaf in pytree.tree_leaves(value)]
        for value in inputs
    )


@pytest.mark.parametrize("order", ["tower", "sequence"])
def test_block_exported_for_layouts_of_any_size(order, tmp_path):
    block, inputs = Block(order), make_inputs(DOCUMENTS, frozen_text=False)
    program = torch.export.export(block, inputs, dynamic_shapes=dynamic(inputs), strict=False)
    program = save_and_load(program, tmp_path / "block.pt2")
    for documents in [DOCUMENTS, *OTHERS]:
        other = make_inputs(documents, frozen_text=False)
        assert_same(program.module()(*other), block(*other))


def test_another_layout_is_refused_where_sizes_are_fixed():
    """It is refused, not read as if it were the first."""
    moved = [[("image", 3), ("text", 3)], [("text", 4), ("image", 6), ("text", 2)]]  # as many tokens of each kind
    other = [[("text", 5), ("image", 5), ("text", 2)], [("image", 3), ("text", 3)]]
    for module in (Block("sequence"), Op("linear"), Op("attention")):
        program = torch.export.export(module, make_inputs(DOCUMENTS, frozen_text=False)).module()
        inputs = make_inputs(moved, frozen_text=False)
        assert_same(program(*inputs), module(*inputs))
        with pytest.raises((AssertionError, RuntimeError), match=r"num_text|Expected input"):
            program(*make_inputs(other, frozen_text=False))


def test_exported_block_trains():
    """With the gradients of the block itself."""
    block, inputs = Block(frozen_text=True), make_inputs(DOCUMENTS)
    program = torch.export.export(block, inputs).module()
    grads = [
        {name: p.grad for name, p in module.named_parameters()}
        for module in (block, program)
        if module(*inputs).square().mean().backward() is None
    ]
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert (grad is None) == (".text." in name) == (grads[1][name] is None), name
        assert grad is None or torch.equal(grad, grads[1][name]), name


def test_a_graph_made_without_gradients_does_not_guess_what_to_keep():
    block, inputs = Block(frozen_text=True), make_inputs(DOCUMENTS)
    with torch.no_grad():
        program = torch.export.export(block, inputs).module()
    grads = [
        torch.autograd.grad(m(*inputs).sum(), [p for p in m.parameters() if p.requires_grad]) for m in (block, program)
    ]
    assert_same(*grads)
    with pytest.raises(RuntimeError, match="made without gradients and cannot be traced again"):
        torch.compile(program, backend="aot_eager")(*inputs)


def test_what_depends_on_counts_is_checked_by_the_graph():
    block, (x, layout, rope) = Block(), make_inputs(DOCUMENTS, frozen_text=True)
    with pytest.raises(ValueError, match="frozen_text=False"):
        torch.compile(block, backend="aot_eager")(x, layout, rope)
    block.requires_grad_(False)
    with pytest.raises(ValueError, match="must have 18 rows for this layout"):
        torch.compile(block, backend="aot_eager")(x[1:], layout, rope)
    with pytest.raises(ValueError, match="cos and sin must be"):
        torch.compile(block, backend="aot_eager")(x, layout, (rope.cos[1:], rope.sin[1:]))


IN_A_FRESH_PROCESS = """
import sys
import torch
import lmfusion_kernels
data = torch.load(sys.argv[2])
is_package = sys.argv[1].endswith("aoti.pt2")
program = torch._inductor.aoti_load_package(sys.argv[1]) if is_package else torch.export.load(sys.argv[1]).module()
with torch.no_grad():
    results = torch.utils._pytree.tree_leaves(program(*data["inputs"]))
assert len(results) == len(data["expected"])
for value, target in zip(results, data["expected"]):
    torch.testing.assert_close(value, target, rtol=data["tolerance"], atol=data["tolerance"])
"""


def run_in_a_fresh_process(path, inputs, expected, tolerance=0.0):
    data = {"inputs": inputs, "expected": pytree.tree_leaves(expected), "tolerance": tolerance}
    torch.save(data, path.with_suffix(".data"))
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(path), str(path.with_suffix(".data"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "weights_only" not in done.stderr


def test_exported_block_in_a_fresh_process(tmp_path):
    block, inputs = Block("sequence", frozen_text=True, qkv_bias=True, qk_norm=True), make_inputs(DOCUMENTS)
    torch.export.save(torch.export.export(block, inputs), tmp_path / "block.pt2")
    run_in_a_fresh_process(tmp_path / "block.pt2", inputs, block(*inputs).detach())


class Everything(nn.Module):
    """All ops and kinds of block."""

    def __init__(self):
        super().__init__()
        self.ops = nn.ModuleList(map(Op, OPS))
        kinds = [BLOCKS[name] for name in ("tower", "all at once", "shared")]
        self.blocks = nn.ModuleList(Block(frozen_text=True, **options) for options in kinds)

    def forward(self, x, layout, rope):
        results = [module(x, layout, rope) for module in (*self.ops, *self.blocks)]
        return pytree.tree_leaves(results)


@pytest.mark.slow
def test_everything_packaged_by_aotinductor(tmp_path):
    module, inputs = Everything(), make_inputs(DOCUMENTS)
    with torch.no_grad():
        program = torch.export.export(module, inputs, strict=False)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "aoti.pt2"))
        assert path == str(tmp_path / "aoti.pt2")
        run_in_a_fresh_process(tmp_path / "aoti.pt2", inputs, module(*inputs), tolerance=1e-5)


@pytest.mark.slow
def test_block_packaged_by_aotinductor_for_layouts_of_any_size(tmp_path):
    block, inputs = Block("sequence").requires_grad_(False), make_inputs(DOCUMENTS)
    program = torch.export.export(block, inputs, dynamic_shapes=dynamic(inputs), strict=False)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "aoti.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for documents in [DOCUMENTS, *OTHERS[:2]]:
        other = make_inputs(documents)
        torch.testing.assert_close(package(*other), block(*other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", [*OPS, *BLOCKS])
def test_make_fx(name, mode):
    """The forward, and the gradients of rows and weights."""
    module = Op(name) if name in OPS else Block(**BLOCKS[name])
    x, layout, rope = make_inputs(DOCUMENTS, frozen_text=False, paired=name == "narrow")
    if name == "narrow":
        x = (x[0], x[1][:, :8].contiguous())
    rows = [t.requires_grad_() for t in pytree.tree_leaves(x)]
    parameters = dict(module.named_parameters())

    def forward(parameters, rows, layout, rope):
        x = rows[0] if len(rows) == 1 else tuple(rows)
        return torch.func.functional_call(module, parameters, (x, layout, rope))

    def backward(parameters, rows, layout, rope):
        loss = sum(y.square().sum() for y in pytree.tree_leaves(forward(parameters, rows, layout, rope)))
        return torch.autograd.grad(loss, [*rows, *parameters.values()], allow_unused=True)

    inputs = (parameters, rows, layout, rope)
    for function in (forward, backward):
        graph = make_fx(function, tracing_mode=mode)(*inputs)
        results, targets = (pytree.tree_leaves(f(*inputs)) for f in (graph, function))
        for value, target in zip(results, targets, strict=True):
            assert (value is None) == (target is None)
            if target is not None:
                torch.testing.assert_close(value, target, rtol=1e-5, atol=1e-5)


def test_layouts_and_tables_are_pytrees():
    _, layout, rope = make_inputs(DOCUMENTS)
    leaves, spec = pytree.tree_flatten((layout, rope))
    again, rope_again = pytree.tree_unflatten(leaves, spec)
    assert_equal_layouts(again, layout)
    assert_same(tuple(rope_again), tuple(rope))
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(layout)[0]]
    assert ".num_text" in paths and ".order_tower_to_sequence" in paths
    moved = pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), layout)
    assert moved.device.type == "meta" and moved.num_tokens == layout.num_tokens
    assert torch.equal(moved.as_two_tensors()[1], layout.as_two_tensors()[1])
    assert_equal_layouts(pickle.loads(pickle.dumps(layout)), layout)


def test_layouts_travel_through_a_data_loader():
    dataset = [DOCUMENTS, OTHERS[0]]
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1, collate_fn=make_inputs)
    block = Block("sequence", frozen_text=True)
    for documents, inputs in zip(dataset, loader, strict=True):
        expected = make_inputs(documents)
        assert_equal_layouts(inputs[1], expected[1])
        assert_same(block(*inputs), block(*expected))


def test_a_layout_that_was_taken_apart():
    """By FSDP2, which rebuilds dataclasses; by `bounded` inside a compiled function."""
    _, layout, _ = make_inputs(DOCUMENTS)
    again = torch.distributed.utils._apply_to_tensors(lambda t: t, layout)
    assert again.as_two_tensors()[0] is layout.as_two_tensors()[0]
    block, (x, layout, rope) = Block(frozen_text=True), make_inputs(DOCUMENTS)
    compiled = torch.compile(lambda x, layout: block(x, layout.bounded(), rope), fullgraph=True, backend="aot_eager")
    assert_same(compiled(x, layout), block(x, layout, rope))


@pytest.mark.parametrize("recompute", ["none", "ffn", "layer"])
def test_opcheck_of_the_block(recompute):
    from lmfusion_kernels.block import op as block_op

    block, (x, layout, rope) = Block(qk_norm=True, frozen_text=True).layers[0], make_inputs(DOCUMENTS)
    weights = [p.detach() for tower in (block.text, block.image) for p in vars(tower.weights(x.dtype)).values()
               if isinstance(p, torch.Tensor)]  # fmt: skip
    names = block_op.block_backward.WEIGHT_NAMES
    present = [i for i in range(2 * len(names)) if names[i % len(names)] != "qkv_bias"]
    order = [getattr(t.weights(x.dtype), n) for t in (block.text, block.image) for n in names if n != "qkv_bias"]
    assert len(order) == len(weights) == len(present)
    arguments = block_op.Traced(
        *layout.as_two_tensors(), layout.num_text, layout.num_live, present, *rope, 1e-6, "tower", "", recompute, ""
    )
    tensors = [w.detach().requires_grad_() for w in order]
    torch.library.opcheck(torch.ops.lmfusion.routed_block.default, ([x.requires_grad_()], tensors, *arguments))
