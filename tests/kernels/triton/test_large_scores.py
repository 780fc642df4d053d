"""The Triton attention kernels are right if scores are so large that the largest takes all the weight.

In float32, against PyTorch's attention in float64. The interpreter's fused multiply-add rounds once, as a GPU's does.
"""

import pytest
import torch

from tests.kernels.triton.test_hybrid_attention import LARGE, SMALL, forward, int32, triton_attention

pytest.importorskip("triton", reason="triton is not installed")

HEAD_DIM = 16
NEXT_BELOW = torch.nextafter(torch.tensor(5e9), torch.tensor(0.0)).item()
SCORES = {
    "two": [5e9, 4.5e9],
    "ascending": [1e5, 1e9, 5e9, 1e12, 1e30],
    "descending": [1e30, 1e12, 5e9, 1e9, 1e5],
    "negative": [-5e9, -4.5e9, -1e12, -1e30],
    "both signs": [-1e30, 1.0, -5e9, 3e9, 2.0],
    "all negative but small": [-1e12, -1e5, -1e5 - 1024],
    "neighbours": [NEXT_BELOW, 5e9, 4.9e9],
    "from small to large": [0.5, 1.0, 1e3, 3e8, 3.1e8, 2.0],
    "at the border of large": [1.8e8, 1.9e8, 2.68e8, 2.7e8, 2.6e8],
    "beyond the range when squared": [1e35, -1e35, 1e36],
}
TIES = {
    "two": [5e9, 5e9, 4e9],
    "all": [-1e12] * 7,
    "in different tiles": [1e30, *[1.0] * 80, 1e30],
    "small ones": [1e5, 1e5, 0.0],
    "a close one": [1e5, 1e5 - 1, 0.0],
}
SCALES = [1.0, 0.25, 96**-0.5]


def one_head(scores, num_queries):
    """q, k, v and a gradient, [N, 1, D]: every query has these scores. Values are small integers."""
    q, k, v, dout = (torch.zeros(n, 1, HEAD_DIM) for n in (num_queries, len(scores), len(scores), num_queries))
    q[..., 0], k[..., 0, 0] = 1.0, torch.tensor(scores)
    generator = torch.Generator().manual_seed(0)
    v.copy_(torch.randint(-4, 5, v.shape, generator=generator))
    dout.copy_(torch.randint(-4, 5, dout.shape, generator=generator))
    return q, k, v, dout


def pytorch(q, k, v, dout, scale):
    """PyTorch's out, lse, dq, dk and dv of dense attention in float64."""
    leaves = [x.double().transpose(0, 1).detach().requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, scale=scale)
    grads = torch.autograd.grad(out, leaves, dout.double().transpose(0, 1))
    lse = (leaves[0] @ leaves[1].transpose(1, 2) * scale).logsumexp(-1)
    return [x.detach() for x in (out.transpose(0, 1), lse, *(grad.transpose(0, 1) for grad in grads))]


def dense(num_queries, num_keys):
    return int32([0] * num_queries), int32([num_keys] * num_queries)


@pytest.mark.parametrize("num_queries", [3, 130], ids=["few queries", "many"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", [*SCORES, *(f"ties, {name}" for name in TIES)])
def test_out_and_lse_are_those_of_pytorch(name, scale, num_queries):
    scores = TIES[name.removeprefix("ties, ")] if name.startswith("ties, ") else SCORES[name]
    q, k, v, dout = one_head(scores, num_queries)
    out, lse = forward(q, k, v, *dense(num_queries, len(scores)), None, scale, tiles=SMALL)
    exact, exact_lse, *_ = pytorch(q, k, v, dout, scale)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-7, atol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", SCORES)
def test_gradients_of_one_key_that_has_all_the_weight(name, scale):
    inputs = one_head(SCORES[name], 130)
    results = triton_attention(*inputs, *dense(130, len(SCORES[name])), scale, tiles=LARGE)
    # dq is a sum of keys whose weights cancel up to the rounding of `out`
    terms = {"dq": 16 * HEAD_DIM * scale * inputs[1].abs().max().item()}
    for what, value, exact in zip(("out", "lse", "dq", "dk", "dv"), results, pytorch(*inputs, scale), strict=True):
        atol = 1e-5 + 1e-7 * terms.get(what, 0.0)
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=atol, msg=lambda m, what=what: f"{what}: {m}")


def test_gradients_are_as_precise_as_a_log_sum_exp_in_float32():
    """Weights of the backward come from lse: at 1e4 its last place is 1e-3, and so is their relative error."""
    inputs = one_head([1e4, 1e4, 1e4 - 1, 0.0], 130)
    *_, dq, dk, dv = triton_attention(*inputs, *dense(130, 4), 0.25, tiles=LARGE)
    _, _, exact_dq, exact_dk, exact_dv = pytorch(*inputs, 0.25)
    torch.testing.assert_close(dv.double(), exact_dv, rtol=1e-3, atol=1e-3 * exact_dv.abs().max().item())
    for value, exact in ((dq, exact_dq), (dk, exact_dk)):
        assert (value - exact).abs().max() <= 2e-3 * exact.abs().max()


@pytest.mark.parametrize("largest", [16384.0, 20480.0, 60000.0])
def test_sums_of_float16(largest):
    """Weights are float16 there, at most 65504: no rounding error may take them beyond that."""
    for num_queries in (3, 130):
        q, k, v, dout = (x.half() for x in one_head([largest, largest, largest / 2, -largest], num_queries))
        q = q * 60000.0
        out, lse = forward(q, k, v, *dense(num_queries, 4), None, 0.25, tiles=SMALL)
        exact, exact_lse, *_ = pytorch(q, k, v, dout, 0.25)
        torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-7, atol=0.0)


def test_scores_that_are_no_numbers_are_seen():
    """An infinite score makes a row and its log-sum-exp NaN, as in PyTorch."""
    for num_queries in (3, 130):
        q, k, v, _ = one_head([1.0, float("inf"), 2.0], num_queries)
        q[1:] = 0.0  # 0 * inf
        out, lse = forward(q, k, v, *dense(num_queries, 3), None, 1.0, tiles=SMALL)
        assert out.isnan().all() and lse.isnan().all()
