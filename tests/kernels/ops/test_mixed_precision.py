"""Rope's angles stay exact where PyTorch casts a module or its arguments: FSDP2, DDP, autocast, .to(dtype)."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import lmfusion_kernels as lk

LAYOUT = lk.TokenLayout.from_spans([[("text", 500), ("marker", 1), ("image", 64), ("text", 30)], [("text", 40)]])
INV_FREQ = 1e4 ** -torch.linspace(0, 1, 8)


class Model(nn.Module):
    """Two layers that get the tables from the caller, or make them from a buffer of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(lk.RoutedBlock(32, 48, 2, 1, 16, frozen_text=True) for _ in range(2))
        self.register_buffer("inv_freq", INV_FREQ.clone(), persistent=False)

    def forward(self, x, layout, rope=None, reentrant=None):
        rope = lk.rope_tables(layout.position, self.inv_freq) if rope is None else rope
        for layer in self.layers:
            if reentrant is None:
                x = layer(x, layout, rope, order="sequence")
            else:
                x = checkpoint(layer, x, layout, rope, "sequence", use_reentrant=reentrant)
        return x


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def x():
    return torch.randn(LAYOUT.num_tokens, 32, generator=torch.Generator().manual_seed(1))


def outcome(model, x, *args, **options):
    """The output, and the gradients of what is trained in float32."""
    model.zero_grad(set_to_none=True)
    y = model(x, LAYOUT, *args, **options)
    y.float().square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return [y.detach(), *(g.full_tensor().float() if hasattr(g, "full_tensor") else g.float() for g in grads)]


def in_bfloat16(model, x):
    """The same with weights and rows in bfloat16, and tables in float32."""
    return outcome(copy.deepcopy(model).bfloat16(), x.bfloat16(), lk.rope_tables(LAYOUT.position, INV_FREQ))


def assert_same(actual, expected, tolerance=0.0):
    for value, target in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, target, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("wrapped", ["layers", "layers and model", "model"])
def test_fsdp_with_its_default_casts(one_rank, x, wrapped, by_keyword):
    model = Model()
    expected = in_bfloat16(model, x)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if wrapped != "model":
        for layer in model.layers:
            fully_shard(layer, mesh=one_rank, mp_policy=policy)
    if wrapped != "layers":
        fully_shard(model, mesh=one_rank, mp_policy=policy)
    rope = lk.rope_tables(LAYOUT.position, INV_FREQ)
    actual = outcome(model, x, rope=rope) if by_keyword else outcome(model, x, rope)
    assert actual[0].dtype == torch.bfloat16
    assert_same(actual, expected)


def test_fsdp_that_casts_the_output(one_rank, x):
    model = Model()
    expected = in_bfloat16(model, x)
    fully_shard(
        model, mesh=one_rank, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    )
    actual = outcome(model, x, lk.rope_tables(LAYOUT.position, INV_FREQ))
    assert actual[0].dtype == torch.float32
    torch.testing.assert_close(actual[0], expected[0].float(), rtol=0, atol=0)


def test_fsdp_casts_a_plain_pair_and_the_error_says_so(one_rank, x):
    model = Model()
    fully_shard(model, mesh=one_rank, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"cos must be float32, got torch\.bfloat16.*as rope_tables returns"):
        model(x, LAYOUT, tuple(lk.rope_tables(LAYOUT.position, INV_FREQ)))


def test_ddp(one_rank, x):
    model = Model()
    rope = lk.rope_tables(LAYOUT.position, INV_FREQ)
    expected = outcome(model, x, rope)
    assert_same(outcome(nn.parallel.DistributedDataParallel(model), x, rope), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing(x, reentrant, autocast):
    model, rope = Model(), lk.rope_tables(LAYOUT.position, INV_FREQ)
    expected = outcome(model, x.requires_grad_(), rope)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_same(outcome(model, x, rope, reentrant=reentrant), expected)


def test_tables_made_under_autocast_and_another_default_dtype():
    expected = lk.rope_tables(LAYOUT.position, INV_FREQ)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(lk.rope_tables(LAYOUT.position, INV_FREQ), expected)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            assert_same(lk.rope_tables(LAYOUT.position, INV_FREQ), expected)
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_module_that_was_cast(x, dtype):
    """Its buffer of frequencies is cast too: an error if that loses digits. Tables from outside are not affected."""
    model = Model()
    rope = lk.rope_tables(LAYOUT.position, INV_FREQ)
    exact = Model().double()(x.double(), LAYOUT, rope, None)
    model.to(dtype)
    if dtype == torch.float64:
        torch.testing.assert_close(model(x.double(), LAYOUT), exact, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(
            ValueError,
            match=rf"inv_freq must be float32 .* got {dtype}, too coarse.*module\.to\(dtype\)",
        ):
            model(x.to(dtype), LAYOUT)
    error = (model(x.to(dtype), LAYOUT, rope).double() - exact).abs().max() / exact.abs().max()
    assert error < 8 * torch.finfo(dtype).eps + 1e-6


def test_coarse_positions_and_tables():
    with pytest.raises(ValueError, match=r"position must be float32 .*got torch\.bfloat16, too coarse"):
        lk.rope_tables(LAYOUT.position.bfloat16(), INV_FREQ)
    rope = lk.rope_tables(LAYOUT.position, INV_FREQ)
    for rows in (torch.float32, torch.float64):
        with pytest.raises(ValueError, match=r"sin must be float32, got torch\.float16"):
            Model().to(rows)(torch.zeros(LAYOUT.num_tokens, 32, dtype=rows), LAYOUT, (rope.cos, rope.sin.half()))


def test_the_example_that_was_cast():
    pytest.importorskip("transformers")
    from tests.documents.test_examples import load

    example = load("llama_block")
    llama, input_ids = example.small_llama(), torch.arange(400)[None]
    example.add_image_tower(llama)
    expected = example.text_logits(copy.deepcopy(llama), input_ids)
    actual = example.text_logits(llama.to(torch.bfloat16), input_ids)
    assert (actual.float() - expected).abs().max() / expected.abs().max() < 4e-2


def test_tables_are_a_pair():
    rope = lk.rope_tables(LAYOUT.position, INV_FREQ)
    cos, sin = rope
    assert len(rope) == 2 and rope[0] is cos is rope.cos and rope[1] is sin is rope.sin
    with pytest.raises(IndexError):
        rope[2]
    assert rope.to("meta").sin.is_meta
    assert "RopeTables(cos=tensor" in repr(rope)
