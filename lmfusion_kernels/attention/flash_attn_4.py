"""FlashAttention-4 (package flash-attn-4, CuTe DSL) with the mask and its lists of blocks: the kernel "flash-attn-4".

One call. Its mask is a function that reads the layout's vectors; the lists say for which blocks of 128 x 128 the
function is called, which blocks are visible as a whole and which are skipped. bfloat16 and float16, head sizes that are
multiples of 8 up to 128 (larger ones use tiles of other sizes), compute capability 9.0; no key-value cache, whose
unused slots it would read; no hidden spans, which leave holes in the ranges that its lists assume.
The backward adds up dq with atomics; with block lists there is no deterministic backward. Kernels are compiled when
first run, which takes seconds. The package is a beta. Untested on GPU.

The backward visits all keys, including those without gradients, because the gradients of queries need them.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lmfusion_kernels.attention.availability import (
    has_module,
    import_failure,
    installed_version,
    unsupported_by_flash,
    unsupported_device,
    wants_deterministic,
)
from lmfusion_kernels.attention.block_lists import block_lists
from lmfusion_kernels.attention.interface import AttentionCall, AttentionProblem, Gradients, aligned, ranges_by_key
from lmfusion_kernels.attention.reference import store_rows

BLOCK = 128
_ops = torch.ops.lmfusion


class FlashAttn4:
    """Hybrid attention by flash_attn.cute with a mask function."""

    summary = "FlashAttention-4 with the mask and its block lists; no hidden spans"
    install = "pip install flash-attn-4"
    is_differentiable = False

    def unavailable_reason(self, device: torch.device) -> str:
        found = installed_version("flash-attn-4")
        if found is None or not has_module("flash_attn.cute"):
            return f"flash-attn-4 is not installed; `{self.install}`"
        return unsupported_device(device, "9.0", ((9, 9),)) or import_failure("flash_attn.cute.interface")

    def unsupported_reason(self, problem: AttentionProblem) -> str:
        if problem.is_cached:
            return "it takes no key-value cache"
        if problem.has_hidden:
            return "it takes no hidden spans"
        if problem.needs_grad and wants_deterministic():
            return "its backward is not deterministic, and torch.use_deterministic_algorithms(True) is set"
        return unsupported_by_flash(problem, max_head_dim=128)

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        q, k, v, *_ = call.aligned()
        key_start, key_end, out_row = call.key_ranges()
        out, lse = _ops.flash_attn_4(q, k, v, key_start, key_end, call.scale)
        return store_rows(out, out_row), lse

    def backward(self, call: AttentionCall, dout: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        (q, k, v, *_), dout = call.aligned(), aligned(dout)
        key_start, key_end, out_row = call.key_ranges()
        if out_row is not None:
            dout, out = dout.index_select(0, out_row), out.index_select(0, out_row)
        keys, query_start, query_end = call.query_ranges()
        every_key = call.queries == "all" or call.layout.num_constant == 0
        if not every_key:
            query_start, query_end = ranges_by_key(key_start, key_end, call.layout.num_keys)
        dq, dk, dv = _ops.flash_attn_4_backward(
            dout, q, k, v, out, lse, key_start, key_end, query_start, query_end, call.scale
        )
        return (dq, dk, dv) if every_key else (dq, dk.index_select(0, keys), dv.index_select(0, keys))


@lru_cache(maxsize=1)
def _mask() -> Callable[..., Any]:
    """The mask as a function of CuTe DSL. Query and key are vectors of one index each."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute import utils

    @cute.jit
    def sees(batch: Any, head: Any, query: Any, key: Any, seqlen_info: Any, aux_tensors: Any) -> Any:
        first = utils.scalar_to_ssa(aux_tensors[0][query[0]], cutlass.Int32)
        after_last = utils.scalar_to_ssa(aux_tensors[1][query[0]], cutlass.Int32)
        return (key >= first) & (key < after_last)

    return sees


def _lists(start: Tensor, end: Tensor, num_columns: int) -> Any:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    num_partial, partial, num_full, full = (
        x.unsqueeze(0).unsqueeze(0) for x in block_lists(start, end, num_columns, BLOCK)
    )
    return BlockSparseTensorsTorch(num_partial, partial, num_full, full, block_size=(BLOCK, BLOCK))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, key_start: Tensor, key_end: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    # causal=False: with causal=True the mask function would not be called on Hopper.
    with torch.cuda.device_of(q):
        out, lse = _flash_attn_fwd(
            q.unsqueeze(0),
            k.unsqueeze(0),
            v.unsqueeze(0),
            softmax_scale=scale,
            causal=False,
            pack_gqa=False,
            mask_mod=_mask(),
            aux_tensors=[key_start, key_end],
            block_sparse_tensors=_lists(key_start, key_end, k.shape[0]),
            return_lse=True,
        )[:2]
    return out.squeeze(0), lse.squeeze(0)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    query_start: Tensor,
    query_end: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    with torch.cuda.device_of(q):
        dq, dk, dv = _flash_attn_bwd(
            q.unsqueeze(0),
            k.unsqueeze(0),
            v.unsqueeze(0),
            out.unsqueeze(0),
            dout.unsqueeze(0),
            lse.unsqueeze(0),
            softmax_scale=scale,
            causal=False,
            mask_mod=_mask(),
            aux_tensors=[key_start, key_end],
            block_sparse_tensors=_lists(query_start, query_end, q.shape[0]),
        )[:3]
    return dq.squeeze(0), dk.squeeze(0), dv.squeeze(0)


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, key_start: Tensor, key_end: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# torch.compile cannot look into CuTe DSL, so it gets ops of torch. Ranges are those of lmfusion::hybrid_attention;
# query_start, query_end and the gradients are of all keys.
_library_of_flash_attn_4 = torch.library.Library("lmfusion", "FRAGMENT")
_library_of_flash_attn_4.define(
    "flash_attn_4(Tensor q, Tensor k, Tensor v, Tensor key_start, Tensor key_end, float scale) -> (Tensor, Tensor)"
)
_library_of_flash_attn_4.define(
    "flash_attn_4_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor key_start, "
    "Tensor key_end, Tensor query_start, Tensor query_end, float scale) -> (Tensor, Tensor, Tensor)"
)
_library_of_flash_attn_4.impl("flash_attn_4", _forward, "CUDA")
_library_of_flash_attn_4.impl("flash_attn_4_backward", _backward, "CUDA")
torch.library.register_fake("lmfusion::flash_attn_4", _fake_forward)
torch.library.register_fake("lmfusion::flash_attn_4_backward", _fake_backward)
