"""What do RoPE and the way to sequence order cost, forward and backward, beside eager PyTorch as users write it?"""

import pytest
import torch

import lmfusion_kernels as lk
from benchmarks.compare import record
from lmfusion_kernels.rope_reorder import rope_reorder

NUM_ROWS, HEADS, KV_HEADS, HEAD_DIM = 4096, 9, 3, 64


def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rope_reorder(benchmark, dtype):
    torch.manual_seed(0)
    layout = lk.TokenLayout.from_spans([[("text", 256), ("image", 256)]] * (NUM_ROWS // 512))
    rope = lk.rope_tables(layout.position, 1e4 ** -torch.linspace(0, 1, HEAD_DIM // 2))
    qkv = torch.randn(NUM_ROWS, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=dtype).requires_grad_()
    grads = [torch.randn(NUM_ROWS, heads, HEAD_DIM, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    cos, sin = (torch.cat([table, table], dim=-1)[:, None].to(dtype) for table in rope)
    order = layout.sequence_to_tower.long()

    def ours():
        results = rope_reorder(qkv, layout, rope, HEADS, backend="native")
        return *(result.detach() for result in results), *torch.autograd.grad(results, qkv, grads)

    def eager():
        q, k, v = qkv.unflatten(1, (-1, HEAD_DIM)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        q, k, v = q[order], k[order], v[order]
        results = (q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin, v)
        return *(result.detach() for result in results), *torch.autograd.grad(results, qkv, grads)

    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for result, target in zip(ours(), eager(), strict=True):
        torch.testing.assert_close(result, target, rtol=tolerance, atol=tolerance)
    num_bytes = 4 * qkv.numel() * qkv.element_size()  # qkv; q, k and v; their gradients; qkv's
    record(benchmark, {"ours": ours, "eager": eager}, "ours", {"eager": 0.5}, num_bytes=num_bytes)
