"""The emulation accepts correct kernels, and detects the mistakes in cuda/faulty.cu."""

import pytest
import torch

THREADS = 64


def call(name):
    """Run a kernel of two blocks on x [128]; returns out [128]."""
    x, out = torch.arange(1.0, 1 + 2 * THREADS), torch.zeros(2 * THREADS)
    getattr(torch.ops.lmfusion_toys_emulated, name)(x, out)
    return out


@pytest.mark.parametrize("seed", range(5))
def test_a_right_kernel_runs(emulation, seed):
    emulation.seed(seed)
    x = torch.arange(1.0, 1 + 2 * THREADS)
    assert call("block_sum")[:2].tolist() == [x[:THREADS].sum(), x[THREADS:].sum()]
    assert emulation.launched() == ["block_sum"]


def test_shuffles(emulation):
    x = torch.arange(1.0, 1 + THREADS)
    lane = torch.arange(THREADS) % 32
    up = torch.where(lane == 0, 0.0, -1.0)  # the first lane of a warp reads itself, and so does the last of 16
    down = torch.where(lane % 16 == 15, 0.0, 1.0)
    expected = x[torch.arange(THREADS) ^ 3] + 100 * up + 1000 * down + 10000
    assert torch.equal(call("shuffles")[:THREADS], expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing_barrier", "race: load .* (shared memory that this block has not written|no barrier between)"),
        ("unordered_shared", "race: load .* (shared memory that this block has not written|no barrier between)"),
        (
            "overwritten_shared",
            "race: (store .* what another thread reads|load .* what another thread writes), with no",
        ),
        ("divergent_barrier", "__syncthreads .* is divergent: this thread has ended"),
        ("two_barriers", "__syncthreads .* is divergent: this thread waits in another place"),
        ("divergent_shuffle", r"a warp operation \(line \d+\) is divergent: its mask names lane 2\d, which has ended"),
        ("shuffle_from_outside", "a shuffle reads lane .*, which takes no part in it"),
        ("store_out_of_bounds", "out of bounds: store of 4 bytes at byte 512 of a tensor of 512 bytes|what another bl"),
        ("load_out_of_bounds", "out of bounds: load of 4 bytes"),
        ("misaligned_store", "misaligned access: an address 4 bytes off its type's alignment of 16"),
        ("misaligned_load", "misaligned access: an address 8 bytes off its type's alignment of 16"),
        ("unwritten_shared", "shared memory that this block has not written"),
        ("blocks_in_order", "race: .* another block of this launch"),
        ("blocks_at_one_place", "race: store of 4 bytes at byte 0 of .* what another block of this launch writes"),
        ("default_stream", "the launch is not on torch's current stream"),
        ("empty_grid", "a launch of nothing is an invalid configuration"),
        ("host_load", "host code's load of 4 bytes of a tensor's data"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_mistake_is_an_error_that_names_the_kernel(emulation, name, message, seed):
    emulation.seed(seed)
    with pytest.raises(RuntimeError, match=message) as error:
        call(name)
    assert f"kernel {name}" in str(error.value)


def test_the_emulation_works_on_after_an_error(emulation):
    for _ in range(3):
        with pytest.raises(RuntimeError, match="divergent"):
            call("divergent_barrier")
        assert call("block_sum")[0] == THREADS * (THREADS + 1) / 2
