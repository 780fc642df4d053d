"""The backward attention kernels in Triton: statistics by row, dq by query tile, dk and dv by listed keys.

Each gradient is summed by the program that owns it, in a fixed order and without atomics: the same inputs give the same
bits. The price is that scores and weight gradients are computed twice (7 products of tiles instead of 5). Weights are
recomputed from q, k and the log-sum-exp of the forward, which is one float32 per row.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from lmfusion_kernels.triton.hybrid_attention_tiles import (
    gather_rows,
    interior,
    load_rows,
    next_run,
    next_section,
    store_rows,
    tile_and_head,
)

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softmax_weights(scores, scale, log_sum, IS_FLOAT32: tl.constexpr):
    """exp(scale * score - log_sum), with a relative error of 6e-8 |log_sum| from the rounding of log_sum.

    In float32 the scaled score is rounded as the forward rounded the largest one, so that a weight of 1 is exactly 1
    however large the scores are. 16-bit operands, whose scores are less precise anyway, save two operations per
    element: there log_sum is in base 2, and the scaled score is exact.
    """
    if IS_FLOAT32:
        # fma and not a plain product, which would be fused with the subtraction.
        return tl.math.exp2((tl.fma(scores, scale, 0.0) - log_sum) * _LOG2_E)
    return tl.math.exp2(tl.fma(scores, scale * _LOG2_E, -log_sum))


@triton.jit(do_not_specialize=["num_queries", "statistics_pitch"])
def attention_backward_rows(
    dout,
    out,
    lse,
    out_row,
    sorted_dout,  # [Nq, H, D] or None
    statistics,  # float32 [2, H, pitch]: log_sum of softmax_weights (inf for a query that sees no key); -dout . out
    statistics_pitch,
    num_queries,
    dout_row_stride,
    dout_head_stride,
    out_row_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Compute the statistics, and reorder dout from out_row to the queries, so that other kernels can read tiles."""
    head = tl.program_id(1)
    query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_query = query < num_queries
    statistic = query  # up to the pitch: tiles are read whole, so values after the last query must be finite
    query = tl.minimum(query, num_queries - 1)
    row = query
    if out_row is not None:
        row = tl.load(out_row + query)
    dout_tile = gather_rows(dout + head.to(tl.int64) * dout_head_stride, dout_row_stride, row, HEAD_DIM, PADDED_DIM)
    out_tile = gather_rows(out + head * HEAD_DIM, out_row_stride, row, HEAD_DIM, PADDED_DIM)
    minus_delta = -tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)
    log_sum = tl.load(lse + head.to(tl.int64) * num_queries + query)
    if dout.dtype.element_ty != tl.float32:
        log_sum = log_sum * _LOG2_E
    log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum)
    is_statistic = statistic < statistics_pitch
    tl.store(statistics + head.to(tl.int64) * statistics_pitch + statistic, log_sum, mask=is_statistic)
    deltas = statistics + (NUM_HEADS + head).to(tl.int64) * statistics_pitch
    tl.store(deltas + statistic, minus_delta, mask=is_statistic)
    if sorted_dout is not None:
        base = sorted_dout + head * HEAD_DIM
        store_rows(base, NUM_HEADS * HEAD_DIM, query, is_query, dout_tile, HEAD_DIM, PADDED_DIM)


@triton.jit
def add_interior(
    acc,
    q_tile,
    dout_tile,
    log_sum,
    minus_delta,
    k,
    v,
    k_tiles,
    v_tiles,
    k_row_stride,
    v_row_stride,
    k_column,  # the first column of the head in the descriptors
    v_column,
    interior_start,
    interior_end,
    high,
    scale,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add to dq the part of the keys that every row sees."""
    for i in tl.range(0, (interior_end - interior_start) // BLOCK_N):
        start = interior_start + i * BLOCK_N
        if k_tiles is not None:
            k_tile = k_tiles.load([start, k_column])
            v_tile = v_tiles.load([start, v_column])
        else:
            k_tile = load_rows(k, k_row_stride, start, high, BLOCK_N, HEAD_DIM, PADDED_DIM, False)
            v_tile = load_rows(v, v_row_stride, start, high, BLOCK_N, HEAD_DIM, PADDED_DIM, False)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        dweights = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
        weights = softmax_weights(scores, scale, log_sum[:, None], q_tile.dtype == tl.float32)
        dscores = weights * (dweights + minus_delta[:, None])
        acc = tl.dot(dscores.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def add_border(
    acc,
    q_tile,
    dout_tile,
    log_sum,
    minus_delta,
    k,
    v,
    k_border,
    v_border,
    k_row_stride,
    v_row_stride,
    k_column,
    v_column,
    run_start,
    run_end,
    interior_start,
    skipped,  # number of keys of the interior, which are skipped
    row_start,  # None: at most run_start
    row_end,
    scale,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BORDER_N: tl.constexpr,
):
    """Add to dq the part of the other keys of [run_start, run_end), of which a row sees [row_start, row_end)."""
    for i in tl.range(0, tl.cdiv(run_end - run_start - skipped, BORDER_N)):
        start = run_start + i * BORDER_N
        start += tl.where(start >= interior_start, skipped, 0)
        if k_border is not None:  # rows after the run belong to other documents
            k_tile = k_border.load([start, k_column])
            v_tile = v_border.load([start, v_column])
        else:
            k_tile = load_rows(k, k_row_stride, start, run_end, BORDER_N, HEAD_DIM, PADDED_DIM, True)
            v_tile = load_rows(v, v_row_stride, start, run_end, BORDER_N, HEAD_DIM, PADDED_DIM, True)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        dweights = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
        key = start + tl.arange(0, BORDER_N)
        if row_start is None:
            visible = key[None, :] < row_end[:, None]
        else:
            visible = (key[None, :] >= row_start[:, None]) & (key[None, :] < row_end[:, None])
        weights = softmax_weights(scores, scale, log_sum[:, None], q_tile.dtype == tl.float32)
        dscores = tl.where(visible, weights * (dweights + minus_delta[:, None]), 0.0)
        acc = tl.dot(dscores.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["statistics_pitch", "num_queries", "num_tiles", "concurrent_heads", "group"])
def attention_backward_queries(
    dout,  # in the order of the queries
    q,
    k,
    v,
    k_tiles,  # tensor descriptors of k and v as [Nk, all heads], with tiles of BLOCK_N rows; None: loads by pointers
    v_tiles,
    k_border,  # the same with tiles of BORDER_N rows
    v_border,
    statistics,
    statistics_pitch,
    key_start,
    key_end,
    visible_end,  # [Nk]; None, as run_end, if no key is hidden
    run_end,
    dq,
    scale,  # as given to the op: natural exponent
    num_queries,
    num_tiles,
    concurrent_heads,
    group,
    dout_row_stride,
    dout_head_stride,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BORDER_N: tl.constexpr,  # divides BLOCK_N
):
    """Compute dq of a tile of queries of one head: keys are read tile by tile, as in the forward."""
    tile, head = tile_and_head(num_tiles, concurrent_heads)
    q += head.to(tl.int64) * q_head_stride
    dout += head.to(tl.int64) * dout_head_stride
    k += (head // group).to(tl.int64) * k_head_stride
    v += (head // group).to(tl.int64) * v_head_stride

    first_row = tile * BLOCK_M
    last_row = tl.minimum(first_row + BLOCK_M, num_queries) - 1
    row = first_row + tl.arange(0, BLOCK_M)
    is_row = row <= last_row
    row = tl.minimum(row, last_row)
    low = tl.load(key_start + first_row)
    high = tl.load(key_end + last_row)

    q_tile = gather_rows(q, q_row_stride, row, HEAD_DIM, PADDED_DIM)
    dout_tile = gather_rows(dout, dout_row_stride, row, HEAD_DIM, PADDED_DIM)
    log_sum = tl.load(statistics + head.to(tl.int64) * statistics_pitch + row)
    minus_delta = tl.load(statistics + (NUM_HEADS + head).to(tl.int64) * statistics_pitch + row)
    acc = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)

    k_column, v_column = (head // group) * k_head_stride, (head // group) * v_head_stride
    done = low
    if visible_end is None:
        shared_low, shared_high = tl.load(key_start + last_row), tl.load(key_end + first_row)
        interior_start, interior_end = interior(low, shared_low, shared_high, BLOCK_N)
        acc = add_interior(
            acc, q_tile, dout_tile, log_sum, minus_delta, k, v, k_tiles, v_tiles, k_row_stride, v_row_stride, k_column,
            v_column, interior_start, interior_end, high, scale, HEAD_DIM, PADDED_DIM, BLOCK_N,
        )  # fmt: skip
        while done < high:
            keys_start, keys_end = next_run(key_start, key_end, row, last_row, done)
            skipped = interior_end - interior_start
            row_start = tl.load(key_start + row)
            row_end = tl.minimum(tl.load(key_end + row), keys_end)  # a tile may reach into the next run
            acc = add_border(
                acc, q_tile, dout_tile, log_sum, minus_delta, k, v, k_border, v_border, k_row_stride, v_row_stride,
                k_column, v_column, keys_start, keys_end, interior_start, skipped, row_start, row_end, scale,
                HEAD_DIM, PADDED_DIM, BORDER_N,
            )  # fmt: skip
            done = keys_end
    else:
        while done < high:
            end, keys_end, hidden_from = next_section(visible_end, run_end, done, high, first_row)
            shared_high = tl.where(hidden_from > last_row, tl.minimum(tl.load(key_end + first_row), keys_end), done)
            interior_start, interior_end = interior(done, done, shared_high, BLOCK_N)
            acc = add_interior(
                acc, q_tile, dout_tile, log_sum, minus_delta, k, v, k_tiles, v_tiles, k_row_stride, v_row_stride,
                k_column, v_column, interior_start, interior_end, high, scale, HEAD_DIM, PADDED_DIM, BLOCK_N,
            )  # fmt: skip
            row_end = tl.where(row < hidden_from, tl.minimum(tl.load(key_end + row), keys_end), done)
            acc = add_border(
                acc, q_tile, dout_tile, log_sum, minus_delta, k, v, k_border, v_border, k_row_stride, v_row_stride,
                k_column, v_column, interior_end, keys_end, done, 0, None, row_end, scale, HEAD_DIM, PADDED_DIM,
                BORDER_N,
            )  # fmt: skip
            done = end

    store_rows(dq + head * HEAD_DIM, NUM_HEADS * HEAD_DIM, row, is_row, acc * scale, HEAD_DIM, PADDED_DIM)


@triton.jit(do_not_specialize=["statistics_pitch", "num_grad_keys", "num_head_parts", "heads_per_part"])
def attention_backward_keys(
    dout,  # in the order of the queries
    q,
    k,
    v,
    q_tiles,  # tensor descriptors of the same memory as [Nq, all heads], for loads by TMA; None: loads by pointers
    dout_tiles,
    statistics_tiles,  # and of statistics as one flat vector
    statistics,
    statistics_pitch,
    grad_key,
    query_start,
    query_end,
    dk,  # [num_head_parts, num_grad_keys, H_kv, D]
    dv,
    scale,
    num_grad_keys,
    num_head_parts,
    heads_per_part,
    dout_row_stride,
    dout_head_stride,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HIDDEN: tl.constexpr,  # whether some keys are hidden, so that query_end does not ascend
):
    """Compute dk and dv of a tile of listed keys, from the heads of the group (or of a part of it) and their query
    tiles."""
    # Tiles run in ascending order, because the first keys of a document are seen by most queries.
    program = tl.program_id(0)
    tile = program // (NUM_KV_HEADS * num_head_parts)
    part = program % num_head_parts
    kv_head = program // num_head_parts % NUM_KV_HEADS
    k += kv_head.to(tl.int64) * k_head_stride
    v += kv_head.to(tl.int64) * v_head_stride

    first_rank = tile * BLOCK_N
    last_rank = tl.minimum(first_rank + BLOCK_N, num_grad_keys) - 1
    rank = tl.minimum(first_rank + tl.arange(0, BLOCK_N), last_rank)
    low = tl.load(query_start + first_rank) // 4 * 4  # statistics are read in steps of 16 bytes
    shared_low = tl.load(query_start + last_rank)
    if HIDDEN:
        high = tl.max(tl.load(query_end + rank), axis=0)
        shared_high = tl.min(tl.load(query_end + rank), axis=0)
    else:
        high = tl.load(query_end + last_rank)
        shared_high = tl.load(query_end + first_rank)  # all keys of the tile are seen from shared_low to here

    key = tl.load(grad_key + rank)
    k_tile = gather_rows(k, k_row_stride, key, HEAD_DIM, PADDED_DIM)
    v_tile = gather_rows(v, v_row_stride, key, HEAD_DIM, PADDED_DIM)
    first_query = tl.load(query_start + rank)
    end_query = tl.load(query_end + rank)
    dk_acc = tl.zeros([BLOCK_N, PADDED_DIM], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, PADDED_DIM], tl.float32)

    # One loop over the tiles of all heads, so that loads are prefetched across heads too.
    tiles_per_head = tl.cdiv(high - low, BLOCK_M)
    for i in tl.range(0, heads_per_part * tiles_per_head):
        head = (kv_head * num_head_parts + part) * heads_per_part + i // tiles_per_head
        start = low + i % tiles_per_head * BLOCK_M
        q_head = q + tl.cast(head, tl.int64) * q_head_stride
        dout_head = dout + tl.cast(head, tl.int64) * dout_head_stride
        log_sums = statistics + tl.cast(head, tl.int64) * statistics_pitch
        deltas = statistics + tl.cast(NUM_HEADS + head, tl.int64) * statistics_pitch
        query = start + tl.arange(0, BLOCK_M)
        if q_tiles is not None:  # rows from `high` on belong to another document, or are zero
            q_tile = q_tiles.load([start, head * q_head_stride])
            dout_tile = dout_tiles.load([start, head * dout_head_stride])
            log_sum = statistics_tiles.load([head * statistics_pitch + start])
            minus_delta = statistics_tiles.load([(NUM_HEADS + head) * statistics_pitch + start])
        else:
            q_tile = load_rows(q_head, q_row_stride, start, high, BLOCK_M, HEAD_DIM, PADDED_DIM, True)
            dout_tile = load_rows(dout_head, dout_row_stride, start, high, BLOCK_M, HEAD_DIM, PADDED_DIM, True)
            log_sum = tl.load(log_sums + query, mask=query < high, other=float("inf"))
            minus_delta = tl.load(deltas + query, mask=query < high, other=0.0)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        weights = softmax_weights(scores, scale, log_sum[None, :], q_tile.dtype == tl.float32)
        if (start < shared_low) | (start + BLOCK_M > shared_high):
            visible = (query[None, :] >= first_query[:, None]) & (query[None, :] < end_query[:, None])
            weights = tl.where(visible, weights, 0.0)
        # delta is the initial value of the product, so that it needs no registers of its own.
        dweights = tl.broadcast_to(minus_delta[None, :], scores.shape)
        dweights = tl.dot(v_tile, tl.trans(dout_tile), dweights, input_precision="ieee")
        dv_acc = tl.dot(weights.to(dout_tile.dtype), dout_tile, dv_acc, input_precision="ieee")
        dscores = weights * dweights
        dk_acc = tl.dot(dscores.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")

    # Recompute the ranks in a way that the compiler cannot merge with the first ones (it adds zero): otherwise their
    # addresses would occupy registers through the whole loop.
    rank = first_rank + tl.minimum(tl.load(query_start + first_rank), 0) + tl.arange(0, BLOCK_N)
    is_rank = rank < num_grad_keys
    to_store = (part.to(tl.int64) * num_grad_keys * NUM_KV_HEADS + kv_head) * HEAD_DIM
    store_rows(dk + to_store, NUM_KV_HEADS * HEAD_DIM, rank, is_rank, dk_acc * scale, HEAD_DIM, PADDED_DIM)
    store_rows(dv + to_store, NUM_KV_HEADS * HEAD_DIM, rank, is_rank, dv_acc, HEAD_DIM, PADDED_DIM)
