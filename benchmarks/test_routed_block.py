"""What does a whole two-tower layer cost, forward and backward, beside diffusers' layer and beside gather and scatter?

Width 576, FFN 1,536, 9 query and 3 key-value heads of 64 (SmolLM2-135M), QK norm; 512 text tokens, then 512 of an
image.
Same weights, outputs compared first.
"""

import pytest
import torch

import lmfusion_kernels as lk
from benchmarks.baselines.gather_scatter import GatherScatterLayer
from benchmarks.compare import record

WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM, NUM_TEXT, NUM_IMAGE = 576, 1536, 9, 3, 64, 512, 512


def make_case(dtype, frozen_text):
    torch.manual_seed(0)
    block = lk.RoutedBlock(WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM, qk_norm=True, frozen_text=frozen_text).to(dtype)
    layout = lk.TokenLayout.from_spans([[("text", NUM_TEXT), ("image", NUM_IMAGE)]], frozen_text=frozen_text)
    x_text, x_image = torch.randn(NUM_TEXT, WIDTH, dtype=dtype), torch.randn(NUM_IMAGE, WIDTH, dtype=dtype)
    rope = lk.rope_tables(layout.position, 1e5 ** -torch.linspace(0, 1, HEAD_DIM // 2))
    return block, layout, x_text, x_image, rope


def ideal_gemm_flops(layout):
    """Forward of every row; one product more for a live row, two for an image row or any row of a trained tower."""
    parameters = WIDTH * (HEADS + 2 * KV_HEADS) * HEAD_DIM + WIDTH * HEADS * HEAD_DIM + 3 * WIDTH * FFN
    trained_text = 0 if layout.num_constant else 2
    return 2 * parameters * (layout.num_text * (1 + trained_text) + 3 * layout.num_image)


def assert_close(ours, theirs, dtype):
    tolerance = 2e-3 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def steps(module, call, inputs, grad_text):
    """One forward and backward from fresh inputs; returns the outputs of the text and image rows."""
    grads = [torch.randn_like(x) for x in inputs]

    def step():
        module.zero_grad(set_to_none=True)
        rows = [x.detach().requires_grad_(i == 1 or grad_text) for i, x in enumerate(inputs)]
        outputs = call(*rows)
        torch.autograd.backward(
            *zip(*[(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad], strict=True)
        )
        return outputs

    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.benchmark(group="routed block")
def test_frozen_text_beside_cosmos3(benchmark, dtype):
    pytest.importorskip("diffusers", reason="its layer is the baseline; pip install diffusers")
    from benchmarks.baselines.cosmos3 import cosmos3_rope, make_cosmos3_layer, text_half

    block, layout, x_text, x_image, rope = make_case(dtype, frozen_text=True)
    peer = make_cosmos3_layer(block, HEADS, KV_HEADS, HEAD_DIM)
    peer_rope = cosmos3_rope(rope, layout, dtype)
    for parameter in text_half(peer):
        parameter.requires_grad_(False)
    inputs = (x_text, x_image)
    ours = steps(block, lambda t, i: block((t, i), layout, rope), inputs, grad_text=False)
    theirs = steps(peer, lambda t, i: peer(t, i, peer_rope), inputs, grad_text=False)
    theirs_with_text_grad = steps(peer, lambda t, i: peer(t, i, peer_rope), inputs, grad_text=True)
    for a, b in zip(ours(), theirs(), strict=True):
        assert_close(a, b, dtype)
    record(
        benchmark,
        {"routed_block": ours, "cosmos3": theirs, "cosmos3, text input with grad": theirs_with_text_grad},
        ours="routed_block",
        bars={"cosmos3": 0.85, "cosmos3, text input with grad": 0.65},
        flops=ideal_gemm_flops(layout),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.benchmark(group="routed block")
def test_beside_gather_and_scatter_with_everything_trained(benchmark, dtype):
    """Ours with its text tower frozen as LMFusion has it, and with both towers trained as the baseline."""
    block, layout, x_text, x_image, rope = make_case(dtype, frozen_text=True)
    trained, trained_layout, *_ = make_case(dtype, frozen_text=False)
    weights = [tower.weights(dtype) for tower in (trained.text, trained.image)]
    peer = GatherScatterLayer(*weights, HEADS, KV_HEADS, HEAD_DIM)
    mask = lk.reference.hybrid_mask(layout)[None, None]
    inputs = (x_text, x_image)

    def call_peer(t, i):
        return peer(torch.cat([t, i]), layout, rope, mask).tensor_split([NUM_TEXT])

    ours = steps(block, lambda t, i: block((t, i), layout, rope), inputs, grad_text=False)
    ours_trained = steps(trained, lambda t, i: trained((t, i), trained_layout, rope), inputs, grad_text=True)
    theirs = steps(peer, call_peer, inputs, grad_text=True)
    for a, b in zip(ours_trained(), theirs(), strict=True):
        assert_close(a, b, dtype)
    record(
        benchmark,
        {"routed_block": ours, "routed_block, all trained": ours_trained, "gather / scatter, all trained": theirs},
        ours="routed_block",
        bars={"gather / scatter, all trained": 0.55},
        flops=ideal_gemm_flops(layout),
    )
