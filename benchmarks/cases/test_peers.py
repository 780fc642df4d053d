"""A layer beside BAGEL's and NeMo Automodel's own layers, imported from checkouts of the user.

LMFUSION_PEER_BAGEL and LMFUSION_PEER_AUTOMODEL name the checkouts; without them the rows say how to get them. Outputs
and gradients are compared before anything is timed. Both peers appear as shipped, with their freeze_und that detaches
activations, and with requires_grad_(False) on the text half: most of our gain over the first is skipped work, which the
second skips too.
"""

import functools

import pytest

from benchmarks.harness import shapes
from benchmarks.harness.compare import Row
from benchmarks.harness.layer import contestant, frozen, layer_flops, make_case, routed_block
from benchmarks.peers.automodel import automodel
from benchmarks.peers.bagel import bagel
from benchmarks.peers.loading import block_mask

SHAPE = shapes.PEER_SHAPE
TOKENS = shapes.NUM_TOKENS if shapes.HAS_GPU else 512
PEERS = {"BAGEL": bagel, "NeMo Automodel, grouped": automodel}


def peer_documents():
    """Captions and images, three quarters image."""
    pair = [("text", 256), ("image", 768)] if shapes.HAS_GPU else [("text", 64), ("image", 192)]
    return [pair] * (TOKENS // sum(length for _, length in pair))


@pytest.mark.parametrize("dtype", shapes.DTYPES[:1], ids=shapes.dtype_id)
@pytest.mark.parametrize("mode", ["forward", "all trained", "frozen text"])
def test_peers(record, device, mode, dtype):
    backward = mode != "forward"
    case = make_case(SHAPE, peer_documents(), dtype, device, frozen_text=mode == "frozen text")
    case = case if backward else frozen(case)
    options = {"mask": lambda: block_mask(case.layout), "is_compiled": device.type == "cuda"}
    contestants = {"ours": contestant(case, routed_block, backward, mask=case.build_layout)}
    for name, peer in PEERS.items():
        if mode != "frozen text":
            contestants[name] = contestant(case, peer, backward, **options)
            continue
        shipped, patched = functools.partial(peer, freeze_und=True), functools.partial(peer, freezes_text=True)
        contestants[f"{name}, as shipped (freeze_und)"] = contestant(case, shipped, backward, **options)
        contestants[f"{name}, requires_grad_(False)"] = contestant(case, patched, backward, **options)
    row = Row("peers", mode, dtype, "forward+backward" if backward else "forward", SHAPE.name, case.layout.num_tokens,
              flops=layer_flops(case, backward))  # fmt: skip
    record(row, contestants)
