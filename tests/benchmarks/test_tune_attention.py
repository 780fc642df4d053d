"""The tuning script tries sensible tiles, and ends without an error if there is no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.tune_attention import LAUNCHES, candidates, describe
from lmfusion_kernels.triton.hybrid_attention_configurations import configurations

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_candidates(launch, capability):
    own = getattr(configurations(128, 2, capability), launch)
    tiles = list(candidates(own, launch))
    assert tiles[0] == own and len(set(tiles)) == len(tiles) > 20
    assert len({describe(tile) for tile in tiles}) == len(tiles)
    for tile in tiles:
        assert tile.step % tile.border == 0 and (own.descriptors or not tile.descriptors)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    command = [sys.executable, "-m", "benchmarks.tune_attention"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "nothing to tune: " in result.stdout
