"""Hybrid attention on a GPU by Triton: chooses and launches the kernels for given shapes.

`forward` and `backward` have the meaning of torch.ops.lmfusion.hybrid_attention and its backward (csrc/schemas.cpp).
The choice of a kernel depends only on shapes and the device, so no call waits for the device, all calls can be captured
in a CUDA graph, and equal calls give equal bits.

Importing this module imports triton. With TRITON_INTERPRET=1 set before triton is first imported, tensors on the CPU
work too (float32 and float16: the interpreter is wrong about bfloat16).
"""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lmfusion_kernels.triton.hybrid_attention_arguments import (
    aligned,
    check_hidden,
    check_rows,
    check_vector,
    default_configurations,
    descriptor_of,
    key_descriptors,
    launch_options,
    padded_dim,
    processors_and_l2_bytes,
    query_tile_counts,
    query_tile_options,
    strides,
)
from lmfusion_kernels.triton.hybrid_attention_backward import (
    attention_backward_keys,
    attention_backward_queries,
    attention_backward_rows,
)
from lmfusion_kernels.triton.hybrid_attention_configurations import Configurations
from lmfusion_kernels.triton.hybrid_attention_decode import attention_forward_split, join_splits
from lmfusion_kernels.triton.hybrid_attention_forward import attention_forward

FEW_QUERIES = 128
"""Up to this number of queries, programs share the keys of a query instead of the queries. The queries would be a
single tile of the other kernel, with one program per head, and often each belongs to another document."""

_MAX_SPLITS = 64
_ROWS_OF_A_WARP_GROUP = 64  # with fewer there is no wgmma, and only wgmma needs tiles by TMA
_BACKWARD_ROWS = 32  # of a program of attention_backward_rows


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    out_row: Tensor | None,
    scale: float,
    visible_end: Tensor | None = None,
    run_end: Tensor | None = None,
    *,
    tiles: Configurations | None = None,
) -> tuple[Tensor, Tensor]:
    """Query i attends to the keys [key_start[i], key_end[i]); its result is row out_row[i] of out (None: row i).

    q [Nq, H, D]; k, v [Nk, H_kv, D], H a multiple of H_kv; float16, bfloat16 or float32 (computed in float32, without
    TF32), D a multiple of 8 up to 256. Any strides; rows that are not contiguous in D, or not aligned to 16 bytes, are
    copied first. The vectors are int32, non-decreasing and within the keys, which is not checked here. visible_end and
    run_end, int32 [Nk] and given together: key j is seen only by the queries before visible_end[j]; the keys from j up
    to run_end[j] have one visible_end, and no range begins after the first of them. A query with an empty range gives
    0, and -inf in lse. Keys outside all ranges are never used, whatever their values. `tiles` replaces the tiles of the
    table (`configurations`), to measure others.

    Returns out [Nq, H, D] of q's dtype and lse float32 [H, Nq], the natural log of the sum of exp(score), by query.
    Raises ValueError when shapes, dtypes or devices do not fit.
    """
    check_rows(q, k, v, {"key_start": key_start, "key_end": key_end, "out_row": out_row})
    check_hidden(visible_end, run_end, k)
    (num_queries, num_heads, head_dim), (num_keys, num_kv_heads, _) = q.shape, k.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, num_queries), dtype=torch.float32, device=q.device)
    if num_queries == 0 or num_keys == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    # The kernels take the maximum of the scores before scaling, and -inf for masked scores: the scale must be positive.
    if scale < 0:
        q, scale = -q, -scale
    elif scale == 0:
        q, scale = q * 0, 1.0
    q, k, v = (aligned(x) for x in (q, k, v))
    tiles = tiles or default_configurations(q)
    group = num_heads // num_kv_heads
    with torch.cuda.device_of(q):
        if visible_end is None and num_queries <= FEW_QUERIES and triton.next_power_of_2(group) <= tiles.split.block:
            _forward_split(q, k, v, key_start, key_end, out_row, scale, out, lse, tiles)
            return out, lse
        tile = tiles.forward
        _, num_tiles, *_ = counts = query_tile_counts(q, k, tile)
        attention_forward[(num_tiles * num_heads,)](
            q,
            k,
            v,
            *key_descriptors(k, v, tile),
            key_start,
            key_end,
            visible_end,
            run_end,
            out_row,
            out,
            lse,
            scale,
            *counts,
            *strides(q, k, v),
            out.stride(0),
            **query_tile_options(head_dim, tile),
        )
    return out, lse


def _forward_split(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    out_row: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    tiles: Configurations,
) -> None:
    (num_queries, num_heads, head_dim), (num_keys, num_kv_heads, _) = q.shape, k.shape
    group = num_heads // num_kv_heads
    padded_group = triton.next_power_of_2(group)
    tile = tiles.split
    most = tile.block // padded_group
    queries = max(
        16 // padded_group, min(most, triton.next_power_of_2(num_queries))
    )  # a product needs at least 16 rows
    num_tiles = triton.cdiv(num_queries, queries)
    num_splits = num_splits_of(num_tiles * num_kv_heads, num_keys, tile.step, processors_and_l2_bytes(q.device)[0])
    parts = torch.empty((num_splits, *q.shape), dtype=torch.float32, device=q.device)
    sums, largest = torch.empty((2, num_splits, num_heads, num_queries), dtype=torch.float32, device=q.device)
    descriptors = (None, None)
    if tile.descriptors and queries * padded_group >= _ROWS_OF_A_WARP_GROUP:
        descriptors = (descriptor_of(k, tile.step), descriptor_of(v, tile.step))
    attention_forward_split[(num_splits, num_kv_heads, num_tiles)](
        q,
        k,
        v,
        *descriptors,
        key_start,
        key_end,
        parts,
        sums,
        largest,
        scale,
        num_queries,
        num_splits,
        *strides(q, k, v),
        NUM_HEADS=num_heads,
        GROUP=group,
        PADDED_GROUP=padded_group,
        QUERIES=queries,
        BLOCK_N=tile.step,
        **launch_options(head_dim, tile),
    )
    join_splits[(num_queries, num_heads)](
        parts,
        sums,
        largest,
        out_row,
        out,
        lse,
        scale,
        num_queries,
        num_splits,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        PADDED_SPLITS=triton.next_power_of_2(num_splits),
        num_warps=4,
    )


def num_splits_of(num_programs: int, num_keys: int, step: int, num_processors: int) -> int:
    """How many parts the keys of a query are split into.

    Enough for two programs per processor, with at least four tiles per part if all keys belong to one query. The host
    does not know more about the ranges.
    """
    wanted = triton.cdiv(2 * num_processors, num_programs)
    return max(1, min(wanted, triton.cdiv(num_keys, 4 * step), _MAX_SPLITS))


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    grad_key: Tensor,
    query_start: Tensor,
    query_end: Tensor,
    out_row: Tensor | None,
    scale: float,
    visible_end: Tensor | None = None,
    run_end: Tensor | None = None,
    *,
    tiles: Configurations | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`: dq of every query, dk and dv of the keys that grad_key lists (int32, ascending).

    Key r of the list is seen by the queries [query_start[r], query_end[r]) (int32, non-decreasing, except query_end
    if visible_end is given). dout and out [Nq, H, D] are read at out_row[i]; lse is the forward's. All rows of k and v
    must be finite, because tiles are read whole. Uses no atomics: equal inputs give equal bits.

    Returns dq [Nq, H, D], dk and dv [len(grad_key), H_kv, D] of q's dtype. Raises ValueError as `forward` does.
    """
    vectors = {"key_start": key_start, "key_end": key_end, "out_row": out_row}
    check_rows(q, k, v, vectors)
    check_hidden(visible_end, run_end, k)
    num_grad_keys = grad_key.numel()
    for name, vector in {"grad_key": grad_key, "query_start": query_start, "query_end": query_end}.items():
        check_vector(name, vector, num_grad_keys, q.device)
    for name, x in {"dout": dout, "out": out}.items():
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be like q, {q.dtype} {tuple(q.shape)}, got {x.dtype} {tuple(x.shape)}")
    (num_queries, num_heads, head_dim), (num_keys, num_kv_heads, _) = q.shape, k.shape
    if lse.shape != (num_heads, num_queries) or lse.dtype != torch.float32:
        raise ValueError(f"lse must be float32 [{num_heads}, {num_queries}], got {lse.dtype} {tuple(lse.shape)}")
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty((num_grad_keys, num_kv_heads, head_dim), dtype=q.dtype, device=q.device)
    dv = torch.empty_like(dk)
    if num_queries == 0 or num_keys == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v, dout, out = (aligned(x) for x in (q, k, v, dout, out))
    tiles = tiles or default_configurations(q)
    with torch.cuda.device_of(q):
        dout, statistics = _backward_rows(dout, out, lse, out_row)
        hidden = visible_end, run_end
        _backward_queries(dout, q, k, v, statistics, key_start, key_end, *hidden, dq, scale, tiles)
        if num_grad_keys:
            by_key = grad_key, query_start, query_end, visible_end is not None
            _backward_keys(dout, q, k, v, statistics, *by_key, dk, dv, scale, tiles)
    return dq, dk, dv


def _backward_rows(dout: Tensor, out: Tensor, lse: Tensor, out_row: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return dout in the order of the queries, and statistics [2, H, pitch]."""
    num_queries, num_heads, head_dim = dout.shape
    pitch = triton.cdiv(num_queries, 4) * 4
    statistics = torch.empty((2, num_heads, pitch), dtype=torch.float32, device=dout.device)
    sorted_dout = None if out_row is None else torch.empty(dout.shape, dtype=dout.dtype, device=dout.device)
    out = out.contiguous()
    attention_backward_rows[(triton.cdiv(num_queries, _BACKWARD_ROWS), num_heads)](
        dout,
        out,
        lse.contiguous(),
        out_row,
        sorted_dout,
        statistics,
        pitch,
        num_queries,
        *strides(dout),
        out.stride(0),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim(head_dim),
        BLOCK_M=_BACKWARD_ROWS,
        num_warps=4,
    )
    return dout if sorted_dout is None else sorted_dout, statistics


def _backward_queries(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    visible_end: Tensor | None,
    run_end: Tensor | None,
    dq: Tensor,
    scale: float,
    tiles: Configurations,
) -> None:
    num_heads, head_dim = q.shape[1:]
    tile = tiles.queries
    _, num_tiles, *_ = counts = query_tile_counts(q, k, tile)
    attention_backward_queries[(num_tiles * num_heads,)](
        dout,
        q,
        k,
        v,
        *key_descriptors(k, v, tile),
        statistics,
        statistics.stride(1),
        key_start,
        key_end,
        visible_end,
        run_end,
        dq,
        scale,
        *counts,
        *strides(dout, q, k, v),
        NUM_HEADS=num_heads,
        **query_tile_options(head_dim, tile),
    )


def _backward_keys(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: Tensor,
    grad_key: Tensor,
    query_start: Tensor,
    query_end: Tensor,
    has_hidden: bool,
    dk: Tensor,
    dv: Tensor,
    scale: float,
    tiles: Configurations,
) -> None:
    num_heads, head_dim = q.shape[1:]
    num_grad_keys, num_kv_heads, _ = dk.shape
    tile = tiles.keys
    num_tiles = triton.cdiv(num_grad_keys, tile.block)
    num_parts = num_head_parts(
        num_tiles * num_kv_heads, num_heads // num_kv_heads, processors_and_l2_bytes(q.device)[0]
    )
    sums = [dk, dv]
    if num_parts > 1:
        sums = [torch.empty((num_parts, *dk.shape), dtype=torch.float32, device=dk.device) for _ in range(2)]
    descriptors = (None, None, None)
    if tile.descriptors:
        flat = TensorDescriptor(statistics, [statistics.numel()], [1], [tile.step])
        descriptors = (descriptor_of(q, tile.step), descriptor_of(dout, tile.step), flat)
    attention_backward_keys[(num_tiles * num_kv_heads * num_parts,)](
        dout,
        q,
        k,
        v,
        *descriptors,
        statistics,
        statistics.stride(1),
        grad_key,
        query_start,
        query_end,
        *sums,
        scale,
        num_grad_keys,
        num_parts,
        num_heads // num_kv_heads // num_parts,
        *strides(dout, q, k, v),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_N=tile.block,
        BLOCK_M=tile.step,
        HIDDEN=has_hidden,
        **launch_options(head_dim, tile),
    )
    if num_parts > 1:
        for grad, parts in zip((dk, dv), sums, strict=True):
            grad.copy_(parts.sum(0))


def num_head_parts(num_programs: int, group: int, num_processors: int) -> int:
    """How many parts a group of heads is split into, each summed by a program of its own.

    The smallest divisor of the group that gives three programs per two processors: the first keys of a long document
    are twice the average work.
    """
    divisors = [n for n in range(1, group + 1) if group % n == 0]
    return next((n for n in divisors if 2 * num_programs * n >= 3 * num_processors), group)
