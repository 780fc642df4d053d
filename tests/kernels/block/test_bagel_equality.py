"""BAGEL's training recipe on our block, against its own layer, on its own packed batch under its own mask.

Forward and every gradient of `routed_block` are compared, with the same weights. Needs a checkout: git clone
https://github.com/ByteDance-Seed/Bagel, and LMFUSION_PEER_BAGEL set to it. `pytest -s` shows the errors.
"""

import os
from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

import lmfusion_kernels as lk
from benchmarks.harness.layer import make_case
from benchmarks.harness.shapes import PEER_SHAPE
from benchmarks.peers import bagel
from tests.kernels.ops.row_ops import needs_native

pytestmark = pytest.mark.skipif(
    not os.environ.get(bagel.VARIABLE), reason=f"{bagel.VARIABLE} names no checkout of {bagel.URL}"
)

# A sample is splits of (tower of the tokens between its markers or "text", length, attn_mode), as dataset_base.py packs
# them: an image, noised for the loss, clean, and as the understanding encoder sees it; markers belong to their image.
UNIFIED = [("text", 30, "causal"), ("vae", 70, "noise"), ("vae", 70, "full"), ("vit", 40, "full"),
           ("text", 25, "causal"), ("vae", 64, "noise")]  # fmt: skip
EDIT = [("vae", 64, "full"), ("vit", 33, "full"), ("text", 12, "causal"), ("vae", 64, "noise")]
NOISE_FIRST = [("vae", 5, "noise"), ("vae", 130, "noise"), ("vae", 5, "full"), ("text", 66, "causal")]
PADDING = [("text", 17, "causal")]
SAMPLES = [UNIFIED, EDIT, NOISE_FIRST, PADDING]


def splits_of(samples):
    """sample_lens, split_lens and attn_modes of a packed batch."""
    lens = [[length + 2 * (kind != "text") for kind, length, _ in sample] for sample in samples]
    modes = [mode for sample in samples for *_, mode in sample]
    return [sum(sample) for sample in lens], [length for sample in lens for length in sample], modes


def document_of(sample):
    """The same splits as spans: an image and its markers see each other; the encoder's tokens are the text tower's."""
    document = []
    for kind, length, mode in sample:
        if kind == "text":
            document.append(("text", length))
            continue
        inner = [("marker", 1), ("image" if kind == "vae" else "text", length), ("marker", 1)]
        document.append(("full", inner, "hidden") if mode == "noise" else ("full", inner))
    return document


def positions_of(samples):
    """Positions as in dataset_base.py: text counts up, an image's tokens share one, as do its noised copies."""
    positions = []
    for sample in samples:
        next_position = 0
        for kind, length, mode in sample:
            if kind == "text":
                positions += range(next_position, next_position + length)
                next_position += length
            else:
                positions += [next_position] * (length + 2)
                next_position += mode != "noise"
    return torch.tensor(positions)


def packed_case(dtype):
    case = make_case(PEER_SHAPE, [document_of(sample) for sample in SAMPLES], dtype, torch.device("cpu"), False)
    inv_freq = 1e6 ** -torch.linspace(0, 1, PEER_SHAPE.head_dim // 2)
    return replace(case, rope=lk.rope_tables(positions_of(SAMPLES), inv_freq))


def gradients_by_name(layer):
    """The weights of a layer of BAGEL, by tower and under our names."""
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    result = {}
    for tower, suffix in (("text", ""), ("image", "_moe_gen")):
        attention, mlp = f"self_attn.{{}}{suffix}", f"mlp{suffix}.{{}}.weight"
        qkv = [attention.format(f"{part}_proj") for part in "qkv"]
        named = {
            "input_layernorm": grads[f"input_layernorm{suffix}.weight"],
            "qkv_proj": torch.cat([grads[f"{name}.weight"] for name in qkv]),
            "qkv_bias": torch.cat([grads[f"{name}.bias"] for name in qkv]),
            "q_norm": grads[attention.format("q_norm") + ".weight"],
            "k_norm": grads[attention.format("k_norm") + ".weight"],
            "o_proj": grads[attention.format("o_proj") + ".weight"],
            "post_attention_layernorm": grads[f"post_attention_layernorm{suffix}.weight"],
            "gate_up_proj": torch.cat([grads[mlp.format("gate_proj")], grads[mlp.format("up_proj")]]),
            "down_proj": grads[mlp.format("down_proj")],
        }
        result |= {f"{tower}.{name}": grad for name, grad in named.items()}
    assert sum(grad.numel() for grad in result.values()) == sum(grad.numel() for grad in grads.values())
    return result


def by_bagel(case, x, dy):
    layer = bagel.layer_of(case)
    x = x.clone().requires_grad_()
    out = bagel.run_packed(layer, x, case, *splits_of(SAMPLES))
    out.backward(dy)
    return {"out": out.detach(), "x": x.grad, **gradients_by_name(layer)}


def by_block(case, x, dy, block):
    x = x.clone().requires_grad_()
    out = block(x, case.layout, case.text, case.image, case.rope, order="sequence")
    out.backward(dy)
    result = {"out": out.detach(), "x": x.grad}
    for tower, weights in (("text", case.text), ("image", case.image)):
        names = [name for name, value in vars(weights).items() if isinstance(value, torch.Tensor)]
        result |= {f"{tower}.{name}": getattr(weights, name).grad for name in names}
    return result


@needs_native
def test_layer_and_gradients():
    """In float32: our error against the float64 reference is at most twice BAGEL's, and both agree."""
    cases = {dtype: packed_case(dtype) for dtype in (torch.float32, torch.float64)}
    exact_case = cases[torch.float64]
    torch.manual_seed(1)
    x, dy = torch.randn(2, exact_case.layout.num_tokens, PEER_SHAPE.hidden_size).unbind()
    for tower in ("text", "image"):  # one set of weights
        for name, value in vars(getattr(cases[torch.float32], tower)).items():
            if isinstance(value, torch.Tensor):
                getattr(exact_case, tower).__dict__[name].data.copy_(value.detach())
    exact = by_block(exact_case, x.double(), dy.double(), lk.reference.routed_block)
    theirs = by_bagel(cases[torch.float32], x, dy)
    ours = by_block(cases[torch.float32], x, dy, lk.routed_block)
    assert exact.keys() == theirs.keys() == ours.keys()
    for name, target in exact.items():
        unit = target.abs().max()
        error, their_error = ((y[name].double() - target).abs().max() / unit for y in (ours, theirs))
        apart = (ours[name] - theirs[name]).abs().max() / unit
        print(f"{name:32} ours {error:.1e}  BAGEL {their_error:.1e}  apart {apart:.1e}")
        assert error <= 2 * their_error + 1e-6 and apart <= 1e-5, name


def test_masks():
    """Both of its masks, sparse and dense, are the layout's."""
    case, utils = packed_case(torch.float32), bagel.load_data_utils()
    sample_lens, split_lens, modes = splits_of(SAMPLES)
    ours = lk.reference.hybrid_mask(case.layout)
    sparse = utils.create_sparse_mask(sample_lens, split_lens, modes, "cpu")
    assert create_mask(sparse, None, None, *ours.shape, device="cpu")[0, 0].equal(ours)
    blocks = []
    for sample in SAMPLES:
        _, lens, sample_modes = splits_of([sample])
        blocks.append(utils.prepare_attention_mask_per_sample(lens, sample_modes) == 0)
    assert torch.block_diag(*blocks).bool().equal(ours)
