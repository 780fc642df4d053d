"""Hybrid attention on a GPU by Triton: which kernel runs, with which tiles, for given shapes?

`forward` and `backward` mean what torch.ops.lmfusion.hybrid_attention and its backward mean (csrc/schemas.cpp). The choice
of a kernel depends on shapes and the device alone, so no call waits for the device, all can be captured in a CUDA
graph, and equal calls give equal bits.

Importing this module imports triton. With TRITON_INTERPRET=1 set before triton is first imported, tensors on the CPU
work too (float32 and float16: the interpreter is wrong about bfloat16).
"""

from functools import cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lmfusion_kernels.triton.hybrid_attention_backward import (
    attention_backward_keys,
    attention_backward_queries,
    attention_backward_rows,
)
from lmfusion_kernels.triton.hybrid_attention_configurations import Configurations, Tile, configurations
from lmfusion_kernels.triton.hybrid_attention_decode import attention_forward_split, join_splits
from lmfusion_kernels.triton.hybrid_attention_forward import attention_forward

INTERPRETED = not isinstance(attention_forward, triton.runtime.JITFunction)
"""Whether the kernels are interpreted on the CPU."""

FEW_QUERIES = 128
"""Up to so many queries, a kernel whose programs share the keys of a query rather than the queries. They would be one
tile of the other kernel, which then has one program a head, and often each is of another document."""

_MAX_SPLITS = 64
_ROWS_OF_A_WARP_GROUP = 64  # fewer are no wgmma, which alone needs tiles by TMA
_BACKWARD_ROWS = 32  # of a program of attention_backward_rows
_INTERPRETED_DEVICE = (8, 2**20)  # processors and bytes of L2 cache that the interpreter pretends to have


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
    run_end, int32 [Nk] and given together: key j is seen by the queries before visible_end[j] alone, and the keys
    from j to run_end[j] have one visible_end, and no range begins behind the first of them. A query with an
    empty range gives 0, and -inf in lse. Keys outside all ranges are not used, whatever they hold. `tiles` replaces
    the tiles of the table (`configurations`), to measure others.

    Returns out [Nq, H, D] of q's dtype and lse float32 [H, Nq], the natural log of the sum of exp(score), by query.
    Raises ValueError when shapes, dtypes or devices do not fit.
    """
    _check(q, k, v, {"key_start": key_start, "key_end": key_end, "out_row": out_row})
    _check_hidden(visible_end, run_end, k)
    (num_queries, num_heads, head_dim), (num_keys, num_kv_heads, _) = q.shape, k.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, num_queries), dtype=torch.float32, device=q.device)
    if num_queries == 0 or num_keys == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    if scale < 0:  # the kernels take the largest score for the largest scaled score
        q, scale = -q, -scale
    elif scale == 0:  # and -inf, which stands for a masked score, stays so when it is scaled
        q, scale = q * 0, 1.0
    q, k, v = (_aligned(x) for x in (q, k, v))
    tiles = tiles or _configurations(q)
    group = num_heads // num_kv_heads
    with torch.cuda.device_of(q):
        if visible_end is None and num_queries <= FEW_QUERIES and triton.next_power_of_2(group) <= tiles.split.block:
            _forward_split(q, k, v, key_start, key_end, out_row, scale, out, lse, tiles)
            return out, lse
        tile = tiles.forward
        num_tiles = triton.cdiv(num_queries, tile.block)
        attention_forward[(num_tiles * num_heads,)](
            q,
            k,
            v,
            *_tiles_of_keys(k, v, tile),
            key_start,
            key_end,
            visible_end,
            run_end,
            out_row,
            out,
            lse,
            scale,
            num_queries,
            num_tiles,
            _heads_together(k, group),
            group,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            out.stride(0),
            HEAD_DIM=head_dim,
            PADDED_DIM=_padded(head_dim),
            BLOCK_M=tile.block,
            BLOCK_N=tile.step,
            BORDER_N=tile.border,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
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
    queries = max(16 // padded_group, min(most, triton.next_power_of_2(num_queries)))  # a product has 16 rows at least
    num_tiles = triton.cdiv(num_queries, queries)
    num_splits = num_splits_of(num_tiles * num_kv_heads, num_keys, tile.step, _device(q.device)[0])
    parts = torch.empty((num_splits, *q.shape), dtype=torch.float32, device=q.device)
    sums, largest = torch.empty((2, num_splits, num_heads, num_queries), dtype=torch.float32, device=q.device)
    descriptors = (None, None)
    if tile.descriptors and queries * padded_group >= _ROWS_OF_A_WARP_GROUP:
        descriptors = (_tiles_of(k, tile.step), _tiles_of(v, tile.step))
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
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        NUM_HEADS=num_heads,
        GROUP=group,
        PADDED_GROUP=padded_group,
        HEAD_DIM=head_dim,
        PADDED_DIM=_padded(head_dim),
        QUERIES=queries,
        BLOCK_N=tile.step,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
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
        PADDED_DIM=_padded(head_dim),
        PADDED_SPLITS=triton.next_power_of_2(num_splits),
        num_warps=4,
    )


def num_splits_of(num_programs: int, num_keys: int, step: int, num_processors: int) -> int:
    """Into how many parts are the keys of a query cut? Enough for two programs a processor; four tiles a part if all
    keys were one query's, which is as much as the host knows."""
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

    Key r of the list is seen by the queries [query_start[r], query_end[r]) (int32, non-decreasing, but for query_end if
    visible_end is given). dout and out [Nq, H, D] are read at out_row[i]; lse is the forward's. All rows of k and v are
    finite: tiles are read whole. Uses no atomics: equal inputs give equal bits.

    Returns dq [Nq, H, D], dk and dv [len(grad_key), H_kv, D] of q's dtype. Raises ValueError as `forward` does.
    """
    vectors = {"key_start": key_start, "key_end": key_end, "out_row": out_row}
    _check(q, k, v, vectors)
    _check_hidden(visible_end, run_end, k)
    num_grad_keys = grad_key.numel()
    for name, vector in {"grad_key": grad_key, "query_start": query_start, "query_end": query_end}.items():
        _check_vector(name, vector, num_grad_keys, q.device)
    for name, x in {"dout": dout, "out": out}.items():
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}; it must be like q, {q.dtype} {tuple(q.shape)}")
    (num_queries, num_heads, head_dim), (num_keys, num_kv_heads, _) = q.shape, k.shape
    if lse.shape != (num_heads, num_queries) or lse.dtype != torch.float32:
        raise ValueError(f"lse is {lse.dtype} {tuple(lse.shape)}; it must be float32 [{num_heads}, {num_queries}]")
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty((num_grad_keys, num_kv_heads, head_dim), dtype=q.dtype, device=q.device)
    dv = torch.empty_like(dk)
    if num_queries == 0 or num_keys == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v, dout, out = (_aligned(x) for x in (q, k, v, dout, out))
    tiles = tiles or _configurations(q)
    with torch.cuda.device_of(q):
        dout, statistics = _backward_rows(dout, out, lse, out_row)
        hidden = visible_end, run_end
        _backward_queries(dout, q, k, v, statistics, key_start, key_end, *hidden, dq, scale, tiles)
        if num_grad_keys:
            by_key = grad_key, query_start, query_end, visible_end is not None
            _backward_keys(dout, q, k, v, statistics, *by_key, dk, dv, scale, tiles)
    return dq, dk, dv


def _backward_rows(dout: Tensor, out: Tensor, lse: Tensor, out_row: Tensor | None) -> tuple[Tensor, Tensor]:
    """dout in the order of the queries, and statistics [2, H, pitch]."""
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
        *dout.stride()[:2],
        out.stride(0),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=_padded(head_dim),
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
    (num_queries, num_heads, head_dim), group = q.shape, q.shape[1] // k.shape[1]
    tile = tiles.queries
    num_tiles = triton.cdiv(num_queries, tile.block)
    attention_backward_queries[(num_tiles * num_heads,)](
        dout,
        q,
        k,
        v,
        *_tiles_of_keys(k, v, tile),
        statistics,
        statistics.stride(1),
        key_start,
        key_end,
        visible_end,
        run_end,
        dq,
        scale,
        num_queries,
        num_tiles,
        _heads_together(k, group),
        group,
        *dout.stride()[:2],
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=_padded(head_dim),
        BLOCK_M=tile.block,
        BLOCK_N=tile.step,
        BORDER_N=tile.border,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
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
    num_parts = num_head_parts(num_tiles * num_kv_heads, num_heads // num_kv_heads, _device(q.device)[0])
    sums = [dk, dv]
    if num_parts > 1:
        sums = [torch.empty((num_parts, *dk.shape), dtype=torch.float32, device=dk.device) for _ in range(2)]
    descriptors = (None, None, None)
    if tile.descriptors:
        flat = TensorDescriptor(statistics, [statistics.numel()], [1], [tile.step])
        descriptors = (_tiles_of(q, tile.step), _tiles_of(dout, tile.step), flat)
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
        *dout.stride()[:2],
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=_padded(head_dim),
        BLOCK_N=tile.block,
        BLOCK_M=tile.step,
        HIDDEN=has_hidden,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if num_parts > 1:
        for grad, parts in zip((dk, dv), sums, strict=True):
            grad.copy_(parts.sum(0))


def num_head_parts(num_programs: int, group: int, num_processors: int) -> int:
    """Into how many parts is a group of heads cut, each summed by a program of its own? The fewest, a divisor of the
    group, that give three programs to two processors: the first keys of a long document are twice the average work."""
    divisors = [n for n in range(1, group + 1) if group % n == 0]
    return next((n for n in divisors if 2 * num_programs * n >= 3 * num_processors), group)


def _tiles_of_keys(k: Tensor, v: Tensor, tile: Tile) -> tuple[TensorDescriptor | None, ...]:
    """Descriptors of k and v for tiles without a mask, and of both for border tiles."""
    if not tile.descriptors:
        return (None,) * 4
    return tuple(_tiles_of(x, rows) for rows in (tile.step, tile.border) for x in (k, v))


def _tiles_of(x: Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of x [N, heads, D] as [N, all heads] whose tiles are `rows` rows of one head."""
    num_rows, num_heads, head_dim = x.shape
    width = (num_heads - 1) * x.stride(1) + head_dim
    return TensorDescriptor(x, [num_rows, width], [x.stride(0), 1], [rows, _padded(head_dim)])


def _aligned(x: Tensor) -> Tensor:
    """x [N, heads, D], copied unless D is contiguous and rows and heads begin at multiples of 16 bytes."""
    step = 16 // x.element_size()
    if x.stride(2) == 1 and x.stride(0) % step == 0 and x.stride(1) % step == 0 and x.data_ptr() % 16 == 0:
        is_row_major = x.stride(0) >= x.stride(1) > 0 or x.shape[1] == 1
        if is_row_major and x.stride(0) > 0:
            return x
    return x.clone(memory_format=torch.contiguous_format)


def _padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _heads_together(k: Tensor, group: int) -> int:
    """Query heads whose programs run side by side: those of as many key-value heads as half of the L2 cache holds."""
    num_keys, num_kv_heads, head_dim = k.shape
    fitting = _device(k.device)[1] // 2 // max(1, 2 * num_keys * head_dim * k.element_size())
    return group * max(n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0 and (n == 1 or n <= fitting))


@cache
def _device(device: torch.device) -> tuple[int, int]:
    """Processors, and bytes of L2 cache."""
    if device.type != "cuda":
        return _INTERPRETED_DEVICE
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


def _configurations(q: Tensor) -> Configurations:
    capability = torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else (9, 0)
    return configurations(q.shape[2], q.element_size(), capability)


def _check(q: Tensor, k: Tensor, v: Tensor, vectors: dict[str, Tensor | None]) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            "q must be [Nq, H, D], k and v both [Nk, H_kv, D]; "
            f"they are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"q, k and v must be of one dtype, float16, bfloat16 or float32; they are {q.dtype}, {k.dtype} and "
            f"{v.dtype}: cast them, or take backend='reference'"
        )
    if q.shape[1] == 0 or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, which is no multiple of the {k.shape[1]} heads of k and v")
    if q.shape[2] % 8 or not 8 <= q.shape[2] <= 256:
        raise ValueError(
            f"the head size is {q.shape[2]}; the Triton kernels take multiples of 8 up to 256: pad q, k and v with "
            "zeros, or take backend='reference'"
        )
    if not q.device == k.device == v.device or (q.device.type != "cuda" and not INTERPRETED):
        raise ValueError(
            f"q, k and v must be on one CUDA device; they are on {q.device}, {k.device} and {v.device} (on the CPU "
            "the kernels run in an interpreter if TRITON_INTERPRET=1 is set before triton is imported)"
        )
    for name, vector in vectors.items():
        if vector is not None:
            _check_vector(name, vector, q.shape[0], q.device)


def _check_hidden(visible_end: Tensor | None, run_end: Tensor | None, k: Tensor) -> None:
    if (visible_end is None) != (run_end is None):
        raise ValueError("give visible_end and run_end together, or none of them")
    if visible_end is not None and run_end is not None:
        _check_vector("visible_end", visible_end, k.shape[0], k.device)
        _check_vector("run_end", run_end, k.shape[0], k.device)


def _check_vector(name: str, vector: Tensor, size: int, device: torch.device) -> None:
    fits = vector.shape == (size,) and vector.dtype == torch.int32 and vector.is_contiguous()
    if not fits or vector.device != device:
        raise ValueError(
            f"{name} must be a contiguous int32 vector with {size} entries on {device}; it is {vector.dtype} "
            f"{tuple(vector.shape)} on {vector.device}"
        )
