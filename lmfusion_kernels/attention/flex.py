"""PyTorch's FlexAttention with a block mask made straight from the layout's vectors: the kernel "flex".

A baseline for the other kernels, and a fallback where they cannot run. float32, bfloat16 and float16 on CUDA devices of
capability 8.0 and later, compiled by torch.compile when first run and again for new shapes; autograd can
follow it there. On the CPU it runs uncompiled and forms all scores: any dtype, small inputs, no gradients. No
key-value cache, whose unused slots it would read. Its `backward`, which a block needs, runs the forward once more. Each
call makes its block mask, (N / 128)^2 int32 on the device; with hidden spans every block is masked token by
token, and no block within the ranges of keys is skipped. Untested on GPU.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lmfusion_kernels.attention.availability import unsupported_device
from lmfusion_kernels.attention.block_lists import block_lists
from lmfusion_kernels.attention.interface import AttentionCall, AttentionProblem, Gradients, dtype_name
from lmfusion_kernels.attention.reference import recomputed_backward, store_rows

BLOCK = 128


class Flex:
    """Hybrid attention by torch.nn.attention.flex_attention."""

    summary = "PyTorch's FlexAttention, block mask from the layout's vectors"
    is_differentiable = True

    def unavailable_reason(self, device: torch.device) -> str:
        return "" if device.type == "cpu" else unsupported_device(device, "8.0 or later", ((8, 99),))

    def unsupported_reason(self, problem: AttentionProblem) -> str:
        if problem.is_cached:
            return "it takes no key-value cache"
        if problem.device.type == "cpu":
            return "it has no gradients on the CPU" if problem.needs_grad else ""
        if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it takes float32, bfloat16 and float16, not {dtype_name(problem.dtype)}"
        if problem.head_dim < 16:
            return f"it takes head sizes from 16 on, not {problem.head_dim}"
        return ""

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        q, k, v = call.q, call.k, call.v
        if q.shape[0] == 0:
            return torch.empty_like(q), q.new_empty((q.shape[1], 0), dtype=torch.float32)
        key_start, key_end, out_row = call.key_ranges()
        query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
        out, aux = _flex_attention(q)(
            query,
            key,
            value,
            block_mask=block_mask(key_start, key_end, k.shape[0], call.hidden_ends()[0]),
            scale=call.scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=_with_lse(),
        )
        return store_rows(out[0].transpose(0, 1), out_row), aux.lse[0]

    def backward(self, call: AttentionCall, dout: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        return recomputed_backward(self.forward, call, dout)


def block_mask(key_start: Tensor, key_end: Tensor, num_keys: int, visible_end: Tensor | None = None) -> Any:
    """A BlockMask in which query i sees the keys j in [key_start[i], key_end[i]), those with i < visible_end[j] if that
    is given."""
    from torch.nn.attention.flex_attention import BlockMask

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = (key >= key_start[query]) & (key < key_end[query])
        return visible if visible_end is None else visible & (query < visible_end[key])

    lists = block_lists(key_start, key_end, num_keys, BLOCK, any_full=visible_end is None)
    num_partial, partial, num_full, full = (x[None, None] for x in lists)
    return BlockMask.from_kv_blocks(
        num_partial,
        partial,
        num_full,
        full,
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(key_start.shape[0], num_keys),
    )


def _flex_attention(q: Tensor) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Inside a compiled function it is compiled with it.
    return _compiled() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _with_lse() -> Any:
    from torch.nn.attention.flex_attention import AuxRequest

    return AuxRequest(lse=True)
