"""The fused block against the reference: values, gradients, token classes and FLOPs."""

import itertools
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lmfusion_kernels as lk
from lmfusion_kernels import reference
from lmfusion_kernels.block.routed_block import RECOMPUTE

DOCUMENTS = [
    [("text", 5), ("marker", 1), ("image", 16), ("marker", 1), ("text", 3)],
    [("marker", 1), ("image", 4), ("marker", 1), ("text", 7), ("image", 4)],
    [("text", 9)],
    [("text", 2), ("image", 1)],
]
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


def make_block(dtype=torch.float32, image_width=32, separation="deep", frozen_text=True, **options):
    torch.manual_seed(0)
    block = lk.RoutedBlock(
        32, 48, HEADS, KV_HEADS, HEAD_DIM, image_hidden_size=image_width, image_intermediate_size=image_width + 8
        if separation == "deep" else 48, separation=separation, frozen_text=frozen_text, **options,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return block.to(dtype)


def make_inputs(layout, dtype, image_width=32, paired=True):
    generator = torch.Generator().manual_seed(1)
    x_text = torch.randn(layout.num_text, 32, generator=generator).to(dtype)
    x_image = torch.randn(layout.num_image, image_width, generator=generator).to(dtype)
    rope = lk.rope_tables(layout.position, 1e4 ** -torch.linspace(0, 1, HEAD_DIM // 2))
    return ((x_text, x_image) if paired else torch.cat([x_text, x_image])), rope


def run(block, x, layout, rope, backend, **options):
    """Outputs and the gradient of everything trainable for a fixed random loss on the rows that are not constant."""
    rows = [t.detach().clone().requires_grad_() for t in (x if isinstance(x, tuple) else (x,))]
    block.zero_grad(set_to_none=True)
    y = block(tuple(rows) if isinstance(x, tuple) else rows[0], layout, rope, backend=backend, **options)
    ys = y if isinstance(y, tuple) else (y[: layout.num_text], y[layout.num_text :])
    generator = torch.Generator().manual_seed(2)
    loss = torch.zeros((), dtype=torch.float64)
    for part, first in zip(ys, (layout.num_constant, 0), strict=True):
        loss = loss + (part.double() * torch.randn(part.shape, generator=generator).double())[first:].sum()
    loss.backward()
    grads = {name: p.grad for name, p in block.named_parameters() if p.requires_grad}
    for i, row in enumerate(rows):
        grads[f"x{i}"] = row.grad[layout.num_constant :] if i == 0 else row.grad
    return {"y_text": ys[0], "y_image": ys[1]} | grads


def assert_as_good_as_reference(block, x, layout, rope, backend="native"):
    exact_block = replace_dtype(block, torch.float64)
    exact_x = tuple(t.double() for t in x) if isinstance(x, tuple) else x.double()
    exact = run(exact_block, exact_x, layout, rope, "reference")
    plain = run(block, x, layout, rope, "reference")
    fused = run(block, x, layout, rope, backend)
    assert fused.keys() == exact.keys()
    for name, target in exact.items():
        if target is None or target.numel() == 0:
            assert fused[name] is None or fused[name].numel() == target.numel()
            continue
        scale = target.abs().max().item() + 1e-6
        error = (fused[name].double() - target).abs().max().item() / scale
        plain_error = (plain[name].double() - target).abs().max().item() / scale
        assert error <= 2 * plain_error + 4 * torch.finfo(plain[name].dtype).eps, (name, error, plain_error)


def replace_dtype(block, dtype):
    import copy

    return copy.deepcopy(block).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen_text", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("variant", ["plain", "qk_norm", "bias", "narrow", "shallow", "none", "one tensor"])
def test_block_equals_reference(dtype, frozen_text, variant):
    options = {"qk_norm": variant == "qk_norm", "qkv_bias": variant == "bias"}
    if variant in ("shallow", "none"):
        options["separation"] = variant
    image_width = 16 if variant == "narrow" else 32
    block = make_block(dtype, image_width, frozen_text=frozen_text, **options)
    layout = lk.TokenLayout.from_spans(DOCUMENTS, frozen_text=frozen_text)
    x, rope = make_inputs(layout, dtype, image_width, paired=variant != "one tensor")
    assert_as_good_as_reference(block, x, layout, rope)


@pytest.mark.parametrize("frozen_text", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize(
    "documents",
    [[], [[("text", 1)]], [[("image", 1)]], [[("text", 12)], [("text", 3)]], [[("image", 8)], [("image", 4)]],
     [[("marker", 1)]]],
    ids=["empty", "one text token", "one image token", "all text", "all image", "one marker"],
)  # fmt: skip
def test_block_on_batches_of_one_kind(documents, frozen_text):
    block = make_block(frozen_text=frozen_text)
    layout = lk.TokenLayout.from_spans(documents, frozen_text=frozen_text)
    x, rope = make_inputs(layout, torch.float32)
    assert_as_good_as_reference(block, x, layout, rope)


def test_sequence_order_is_tower_order_moved():
    block = make_block()
    layout = lk.TokenLayout.from_spans(DOCUMENTS)
    x, rope = make_inputs(layout, torch.float32, paired=False)
    expected = layout.to_sequence_order(block(x, layout, rope))
    torch.testing.assert_close(block(layout.to_sequence_order(x), layout, rope, order="sequence"), expected)


def test_frozen_weights_and_constant_rows_get_no_gradient():
    block = make_block()
    layout = lk.TokenLayout.from_spans(DOCUMENTS)
    (x_text, x_image), rope = make_inputs(layout, torch.float32)
    x_text.requires_grad_()
    y_text, y_image = block((x_text, x_image), layout, rope)
    (y_text.sum() + y_image.sum()).backward()
    assert all(p.grad is None for p in block.text.parameters())
    assert all(p.grad is not None for p in block.image.parameters())
    assert x_text.grad[: layout.num_constant].eq(0).all()
    assert x_text.grad[layout.num_constant :].abs().sum(1).gt(0).all()


def test_gradients_at_constant_rows_do_not_depend_on_the_backend():
    block = make_block()
    layout = lk.TokenLayout.from_spans(DOCUMENTS)
    x, rope = make_inputs(layout, torch.float32)
    for backend in ("native", "reference"):
        x_text = x[0].clone().requires_grad_()
        y_text, y_image = block((x_text, x[1]), layout, rope, backend=backend)
        (y_text.square().sum() + y_image.square().sum()).backward()
        assert x_text.grad[: layout.num_constant].eq(0).all(), backend


def test_text_loss_after_an_image_reaches_the_image_tower_through_frozen_text():
    block = make_block()
    layout = lk.TokenLayout.from_spans([[("image", 4), ("text", 3)]])
    x, rope = make_inputs(layout, torch.float32)
    y_text, _ = block(x, layout, rope)
    y_text.square().sum().backward()
    qkv_grad = block.image.self_attn.qkv_proj.weight.grad
    k_and_v = qkv_grad[HEADS * HEAD_DIM :]
    assert k_and_v.abs().sum() > 0
    reference_block = make_block()
    reference_block(x, layout, rope, backend="reference")[0].square().sum().backward()
    torch.testing.assert_close(qkv_grad, reference_block.image.self_attn.qkv_proj.weight.grad, rtol=1e-4, atol=1e-5)


def test_backward_flops_are_those_of_the_row_classes():
    layout = lk.TokenLayout.from_spans([[("text", 64), ("image", 64), ("text", 32)]])
    assert (layout.num_constant, layout.num_live, layout.num_image) == (64, 32, 64)
    block = make_block()
    x, rope = make_inputs(layout, torch.float32)
    x[0].requires_grad_()
    x[1].requires_grad_()
    y = block(x, layout, rope)
    with FlopCounterMode(display=False) as counter:
        (y[0].sum() + y[1].sum()).backward()
    counts = counter.get_flop_counts()["Global"]
    gemm = sum(flops for op, flops in counts.items() if str(op) in ("aten.mm", "aten.addmm"))

    def parameters(layer):
        return sum(p.numel() for p in layer.parameters() if p.dim() == 2)

    ideal = 2 * (layout.num_live * parameters(block.text) + 2 * layout.num_image * parameters(block.image))
    assert ideal <= gemm <= 1.02 * ideal


@pytest.mark.parametrize("paired", [True, False], ids=["pair", "one tensor"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("frozen_text", [True, False], ids=["frozen", "trainable"])
def test_compiles_without_graph_break(frozen_text, recompute, paired):
    block = make_block(frozen_text=frozen_text, qk_norm=not paired)
    layout = lk.TokenLayout.from_spans(DOCUMENTS, frozen_text=frozen_text)
    x, rope = make_inputs(layout, torch.float32, paired=paired)
    eager = run(block, x, layout, rope, None)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for name, value in run_compiled(compiled, block, x, layout, rope, recompute=recompute).items():
        torch.testing.assert_close(value, eager[name], rtol=1e-5, atol=1e-5, msg=name)


def run_compiled(compiled, block, x, layout, rope, **options):
    def call(rows, layout, rope, backend=None):
        return compiled(rows, layout, rope, **options)

    call.zero_grad = block.zero_grad
    call.named_parameters = block.named_parameters
    return run(call, x, layout, rope, None)


@pytest.mark.parametrize("spans", [("text", "image"), ("image", "text"), ("text", "image", "text")])
def test_stacked_blocks_compile_once_for_many_layouts(spans):
    """Counts that coincide (all text constant, all text live) work with symbolic shapes."""
    torch._dynamo.reset()
    blocks = [make_block() for _ in range(2)]
    counter = CompileCounterWithBackend("aot_eager")

    def model(x, layout, rope):
        for block in blocks:
            x = block(x, layout, rope, order="sequence")
        return x

    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (3, 5, 8, 9):
        documents = [[(span, length + i) for i, span in enumerate(spans)], [("text", 7), ("image", length)]]
        layout = lk.TokenLayout.from_spans(documents)
        x, rope = make_inputs(layout, torch.float32, paired=False)
        outcome = output_and_gradient(compiled, x, layout, rope)
        torch.testing.assert_close(outcome, output_and_gradient(model, x, layout, rope), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 3


def output_and_gradient(model, x, layout, rope):
    x = x.clone().requires_grad_()
    y = model(x, layout, rope)
    return y.detach(), torch.autograd.grad(y[layout.tower_to_sequence[layout.num_constant :].long()].sum(), x)[0]


@pytest.mark.parametrize("recompute", ["none", "ffn", "layer"])
def test_saved_tensors_are_unpacked_once(recompute):
    """As torch.utils.checkpoint and save_on_cpu need it."""
    block, layout = make_block(), lk.TokenLayout.from_spans(DOCUMENTS)
    (x_text, x_image), rope = make_inputs(layout, torch.float32)
    packed, unpacked = [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(1) or t, lambda t: unpacked.append(1) or t):
        y = block((x_text.requires_grad_(), x_image), layout, rope, recompute=recompute)
        (y[0].sum() + y[1].sum()).backward()
    assert len(unpacked) == len(packed)
    grad = x_text.grad.clone()
    x_text.grad = None
    y = checkpoint(block, (x_text, x_image), layout, rope, use_reentrant=False)
    (y[0].sum() + y[1].sum()).backward()
    assert torch.equal(x_text.grad, grad)


def test_one_compiled_block_serves_many_layouts():
    block = make_block()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for num_text in (3, 5, 8, 13, 21):
        layout = lk.TokenLayout.from_spans([[("text", num_text), ("image", 2 * num_text), ("text", 4)]])
        x, rope = make_inputs(layout, torch.float32)
        expected = run(block, x, layout, rope, None)
        for name, value in run_compiled(compiled, block, x, layout, rope).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    assert counter.frame_count <= 2  # one for the first numbers, one for all others


def test_cached_decoding_equals_one_pass():
    block = make_block()
    documents = [[("text", 6), ("image", 4)], [("text", 3), ("image", 4)]]
    layout = lk.TokenLayout.from_spans(documents)
    (x_text, x_image), rope = make_inputs(layout, torch.float32)
    with torch.no_grad():
        whole_text, whole_image = block((x_text, x_image), layout, rope)
        num_rows, inv_freq = 24, 1e4 ** -torch.linspace(0, 1, HEAD_DIM // 2)
        weights = block.text.weights(torch.float32), block.image.weights(torch.float32)
        cache = tuple(torch.zeros(num_rows, KV_HEADS, HEAD_DIM) for _ in range(2))
        for backend in ("native", "reference"):
            place = {"cache_starts": [3, 15], "cache_slots": num_rows}
            prefix = lk.TokenLayout.from_spans([[("text", 6)], [("text", 3)]], cached_lengths=[0, 0], **place)
            images = lk.TokenLayout.from_spans([[("image", 4)], [("image", 4)]], cached_lengths=[6, 3], **place)
            none = x_text[:0], x_image[:0]
            first, _ = lk.routed_block((x_text, none[1]), prefix, *weights, lk.rope_tables(prefix.position, inv_freq),
                                       kv_cache=cache, backend=backend)  # fmt: skip
            _, second = lk.routed_block((none[0], x_image), images, *weights, lk.rope_tables(images.position, inv_freq),
                                        kv_cache=cache, backend=backend)  # fmt: skip
            torch.testing.assert_close(first, whole_text, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(second, whole_image, rtol=1e-4, atol=1e-5)


def test_bad_input_is_named():
    block = make_block()
    layout = lk.TokenLayout.from_spans(DOCUMENTS)
    x, rope = make_inputs(layout, torch.float32)
    text, image = block.text.weights(torch.float32), block.image.weights(torch.float32)
    with pytest.raises(ValueError, match="recompute must be one of none, ffn, layer, got 'all'"):
        lk.routed_block(x, layout, text, image, rope, recompute="all")
    with pytest.raises(ValueError, match="order must be 'tower' or 'sequence', got 'towers'"):
        lk.routed_block(x, layout, text, image, rope, order="towers")
    with pytest.raises(ValueError, match=r"text rows must have \d+ rows for this layout, got shape"):
        lk.routed_block((x[0][1:], x[1]), layout, text, image, rope)
    with pytest.raises(ValueError, match="float64"):
        lk.routed_block(x, layout, text, replace(image, down_proj=image.down_proj.double()), rope)
    with pytest.raises(ValueError, match="frozen_text=False"):
        lk.routed_block(x, layout, replace(text, down_proj=text.down_proj.detach().requires_grad_()), image, rope)
    with pytest.raises(ValueError, match="cos and sin must be"):
        lk.routed_block(x, layout, text, image, (rope[0][1:], rope[1][1:]))
    with pytest.raises(ValueError, match="equally many heads"):
        lk.routed_block(x, layout, text, replace(image, qkv_proj=image.qkv_proj[2 * HEAD_DIM :]), rope)
    with pytest.raises(ValueError, match="must divide into H"):
        lk.routed_block(x, layout, replace(text, qkv_proj=text.qkv_proj[HEAD_DIM:]), image, rope)
    with pytest.raises(ValueError, match="kv_cache"):
        lk.routed_block(x, layout, text, image, rope, kv_cache=(x[0], x[0]))
    with pytest.raises(ValueError, match="eps"):
        lk.routed_block(x, layout, text, replace(image, eps=1e-3), rope)
    with pytest.raises(ValueError, match=r"cos must be float32, got torch\.bfloat16"):
        lk.routed_block(x, layout, text, image, (rope[0].bfloat16(), rope[1]))
    with pytest.raises(ValueError, match=r"\[rows, width\]"):
        lk.routed_block((x[0][None].transpose(0, 1), x[1]), layout, text, image, rope)
    for name in ("o_proj", "gate_up_proj", "down_proj", "input_layernorm", "post_attention_layernorm"):
        with pytest.raises(ValueError, match=name):
            lk.routed_block(x, layout, text, replace(image, **{name: getattr(image, name)[:-1]}), rope)
    with pytest.raises(ValueError, match="one angle per pair"):
        block(x, layout, tuple(torch.cat([table, table], dim=-1) for table in rope))
    with pytest.raises(ValueError, match="backend"):
        lk.routed_block(x, layout, text, image, rope, backend="fastest")


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_rows_that_are_no_floating_point_numbers(dtype, backend):
    """Every op raises the same error, whichever backend would have run."""
    layout = lk.TokenLayout.from_spans([[("text", 2), ("image", 3)]], frozen_text=False)
    x, q = torch.ones(5, 8, dtype=dtype), torch.ones(5, 1, 8, dtype=dtype)
    norm, square, gate_up = (torch.ones(*shape, dtype=dtype) for shape in ((8,), (8, 8), (16, 8)))
    rope = lk.rope_tables(layout.position, torch.ones(4))
    calls = [
        lambda: lk.routed_rms_norm(x, norm, norm, layout, 1e-6, backend=backend),
        lambda: lk.routed_linear((x[:2], x[2:]), square, square, layout, backend=backend),
        lambda: lk.rope_reorder(x.repeat(1, 3), layout, rope, 1, backend=backend),
        lambda: lk.routed_swiglu(x, gate_up, square, gate_up, square, layout, backend=backend),
        lambda: lk.hybrid_attention(q, q, q, layout, backend=backend),
        lambda: lk.RoutedBlock(8, 8, 1, 1)(x, layout, rope, "sequence", backend=backend),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=rf"(x|q|qkv) must be in one of float32, bfloat16.*, got {dtype}"):
            call()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((65, 48, 4, 2), "hidden_size must be a multiple of num_heads 4, got 65; give head_dim"),
        ((64, 48, 4, 3), "num_heads must be a multiple of num_kv_heads 3, got 4"),
        ((0, 48, 4, 2), "hidden_size must be positive, got 0"),
        ((64, -48, 4, 2), "intermediate_size must be positive, got -48"),
        ((64, 48, 0, 2), "num_heads must be positive, got 0"),
        ((64, 48, 4, 0), "num_kv_heads must be positive, got 0"),
        ((64, 48, 4, 2, 0), "head_dim must be positive, got 0"),
        ((64, 48, 4, 2, 15), "head_dim must be even, .*, got 15"),
        ((12, 48, 4, 2), "head_dim must be even, .*, got 3"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    for module in (lk.RoutedBlock, lk.TowerLayer):
        with pytest.raises(ValueError, match=message):
            module(*sizes)


@pytest.mark.parametrize("name", ["image_hidden_size", "image_intermediate_size"])
def test_an_image_tower_of_no_size(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        lk.RoutedBlock(64, 48, 4, 2, **{name: 0})


def test_bad_caches_are_named():
    block = make_block()
    layout = lk.TokenLayout.from_spans([[("text", 3)]], cached_lengths=[2], cache_starts=[0], cache_slots=8)
    x, rope = make_inputs(layout, torch.float32)
    weights = block.text.weights(torch.float32), block.image.weights(torch.float32)
    cache = torch.zeros(8, KV_HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match="no backward"):
        lk.routed_block(x, layout, *weights, rope, kv_cache=(cache, cache))
    with torch.no_grad():
        for wrong in (cache[1:], cache.double(), cache[:, :1]):
            with pytest.raises(ValueError, match="kv_cache values"):
                lk.routed_block(x, layout, *weights, rope, kv_cache=(cache, wrong))
        with pytest.raises(ValueError, match="needs kv_cache"):
            lk.routed_block(x, layout, *weights, rope)


def test_qk_norm_in_the_image_tower_alone():
    block = make_block(qk_norm=True)
    block.text.self_attn.q_norm = block.text.self_attn.k_norm = None
    layout = lk.TokenLayout.from_spans(DOCUMENTS)
    x, rope = make_inputs(layout, torch.float32)
    assert_as_good_as_reference(block, x, layout, rope)


def test_no_second_derivative_of_native_ops():
    q = torch.randn(4, 2, 16, requires_grad=True)
    layout = lk.TokenLayout.from_spans([[("text", 4)]])
    (dq,) = torch.autograd.grad(lk.hybrid_attention(q, q, q, layout).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.sum().backward()
    (dq,) = torch.autograd.grad(lk.hybrid_attention(q, q, q, layout, backend="reference").sum(), q, create_graph=True)
    dq.sum().backward()


def test_shared_weights_have_one_shape():
    with pytest.raises(ValueError, match="image_hidden_size"):
        lk.RoutedBlock(32, 48, 4, 2, image_hidden_size=16, separation="shallow")
    with pytest.raises(ValueError, match="image_intermediate_size"):
        lk.RoutedBlock(32, 48, 4, 2, image_intermediate_size=96, separation="none")
    with pytest.raises(ValueError, match="separation"):
        lk.RoutedBlock(32, 48, 4, 2, separation="half")


def test_reference_block_passes_gradcheck():
    block = make_block(torch.float64, qk_norm=True, qkv_bias=True)
    layout = lk.TokenLayout.from_spans([[("text", 1), ("marker", 1), ("image", 2), ("text", 1)]], frozen_text=False)
    (x_text, x_image), rope = make_inputs(layout, torch.float64)
    text, image = block.text.weights(torch.float64), block.image.weights(torch.float64)
    names = [f.name for f in fields(image) if isinstance(getattr(image, f.name), Tensor)]
    tensors = [getattr(image, name).detach().requires_grad_() for name in names]

    def call(x_text, x_image, *tensors):
        trained = replace(image, **dict(zip(names, tensors, strict=True)))
        return reference.routed_block((x_text, x_image), layout, text, trained, rope)

    rows = (x_text.requires_grad_(), x_image.requires_grad_())
    assert torch.autograd.gradcheck(call, (*rows, *tensors), fast_mode=True)


def test_many_random_layouts():
    generator = torch.Generator().manual_seed(3)
    kinds = ("text", "image", "marker")
    block = make_block()
    for _, frozen_text in itertools.product(range(4), (True, False)):
        block.text.requires_grad_(not frozen_text)
        documents = [
            [(kinds[int(torch.randint(3, (), generator=generator))], int(torch.randint(1, 9, (), generator=generator)))
             for _ in range(int(torch.randint(1, 6, (), generator=generator)))]
            for _ in range(4)
        ]  # fmt: skip
        layout = lk.TokenLayout.from_spans(documents, frozen_text=frozen_text)
        x, rope = make_inputs(layout, torch.float32)
        assert_as_good_as_reference(block, x, layout, rope)


def test_autocast_has_no_effect():
    block = make_block()
    layout = lk.TokenLayout.from_spans(DOCUMENTS)
    x, rope = make_inputs(layout, torch.float32)
    expected = run(block, x, layout, rope, "native")
    with torch.autocast("cpu", torch.bfloat16):
        for name, value in run(block, x, layout, rope, "native").items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)
        for y, target in zip(block(x, layout, rope, backend="reference"), block(x, layout, rope), strict=True):
            torch.testing.assert_close(y, target, rtol=1e-4, atol=1e-4)
