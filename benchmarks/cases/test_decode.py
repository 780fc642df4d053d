"""One layer of a decoding step: one text token per document, over its cached keys and values.

The floor is to read the text tower's weights and the cache once; GB/s count these bytes. Times are latencies.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.baselines.slabs import slabs
from benchmarks.cases.test_denoise_step import cached_block, inference
from benchmarks.harness import shapes
from benchmarks.harness.compare import Row, graphed
from benchmarks.harness.layer import cache_of, frozen, make_case

SHAPES = [shapes.LMFUSION_8B, shapes.SMOLLM2] if shapes.HAS_GPU else [shapes.SMOLLM2]
CASES = [(1, 1024), (8, 1024), (8, 8192), (16, 1024), (64, 1024)] if shapes.HAS_GPU else [(1, 512), (4, 512), (4, 2048)]


@pytest.mark.parametrize("dtype", shapes.DTYPES[-1:], ids=shapes.dtype_id)
@pytest.mark.parametrize(("documents", "context"), CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode(record, device, shape, documents, context, dtype):
    case = make_case(shape, [[("text", 1)]] * documents, dtype, device, frozen_text=True,
                     **cache_of(documents, context, context + 64))  # fmt: skip
    case = frozen(case)
    size = (case.layout.num_keys, shape.num_kv_heads, shape.head_dim)
    caches = tuple(torch.randn(*size, device=device).to(dtype) for _ in range(2))
    kv_cache = tuple(cache.clone() for cache in caches)

    def padded_sdpa(q, k, v):
        """One query per document over equally long caches, as models with a static cache call SDPA."""
        keys, values = (x.unflatten(0, (documents, -1))[:, : context + 1].transpose(1, 2) for x in (k, v))
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)[:, :, 0]

    ours = inference(case, cached_block(case, caches), mask=case.build_layout)
    stock = inference(case, slabs(case, True, padded_sdpa, kv_cache).forward, is_compiled=True)
    contestants = {
        "ours": ours,
        "slabs, eager, SDPA": inference(case, slabs(case, False, padded_sdpa, kv_cache).forward),
        "slabs, compiled, SDPA": stock,
    }
    if device.type == "cuda":
        contestants |= {"ours, CUDA graph": graphed(ours), "slabs, compiled, SDPA, CUDA graph": graphed(stock)}
    cached = 2 * documents * (context + 1) * shape.num_kv_heads * shape.head_dim
    row = Row("decode", f"{documents} document{'s' if documents > 1 else ''}, context {context}", dtype, "forward",
              shape.name, documents, num_bytes=(shape.num_parameters + cached) * dtype.itemsize,
              is_latency=True)  # fmt: skip
    record(row, contestants)
