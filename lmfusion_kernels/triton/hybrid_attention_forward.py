"""How does a tile of queries attend to its keys? The forward kernel, one program for each query tile and head.

Keys come in tiles. Those that every row of the query tile sees come first, without masks; the others with one. The
softmax is kept as a running maximum and sum per row (in base 2: exp2 is one instruction), so order is free.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from lmfusion_kernels.triton.hybrid_attention_tiles import (
    gather_rows,
    interior,
    load_rows,
    next_run,
    store_rows,
    tile_and_head,
)


@triton.jit
def add_unmasked(acc, row_sum, row_max, scores, scale, v):
    """One key tile into the running softmax; scale >= 0, so the largest score is the largest scaled score."""
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale)
    weights = tl.math.exp2(scores * scale - new_max[:, None])
    correction = tl.math.exp2(row_max - new_max)
    row_sum = row_sum * correction + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * correction[:, None], input_precision="ieee")
    return acc, row_sum, new_max


@triton.jit
def add_masked(acc, row_sum, row_max, scores, scale, v, visible):
    """The same for a tile of which some rows may see nothing, in it or so far."""
    scores = tl.where(visible, scores * scale, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.math.exp2(scores - finite_max[:, None])
    correction = tl.math.exp2(row_max - finite_max)
    row_sum = row_sum * correction + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * correction[:, None], input_precision="ieee")
    return acc, row_sum, new_max


@triton.jit
def normalise(acc, row_sum, row_max):
    """The result, and the log of the sum of exp(score) in base 2: 0 and -inf for a row that saw nothing."""
    seen = row_sum > 0.0
    safe_sum = tl.where(seen, row_sum, 1.0)
    return acc * (1.0 / safe_sum)[:, None], tl.where(seen, row_max + tl.math.log2(safe_sum), float("-inf"))


@triton.jit(do_not_specialize=["num_queries", "num_tiles", "heads_together", "group"])
def attention_forward(
    q,
    k,
    v,
    k_tiles,  # tensor descriptors of the same memory as [Nk, all heads], or None: interior tiles come by TMA
    v_tiles,
    key_start,
    key_end,
    out_row,
    out,
    lse,
    scale,  # times log2(e), not negative
    num_queries,
    num_tiles,
    heads_together,
    group,  # query heads of one key-value head
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    out_row_stride,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BORDER_N: tl.constexpr,  # divides BLOCK_N
):
    tile, head = tile_and_head(num_tiles, heads_together)
    q += head.to(tl.int64) * q_head_stride
    k += (head // group).to(tl.int64) * k_head_stride
    v += (head // group).to(tl.int64) * v_head_stride

    first_row = tile * BLOCK_M
    last_row = tl.minimum(first_row + BLOCK_M, num_queries) - 1
    row = first_row + tl.arange(0, BLOCK_M)
    is_row = row <= last_row
    row = tl.minimum(row, last_row)  # rows behind the last repeat it and are not stored
    low = tl.load(key_start + first_row)
    high = tl.load(key_end + last_row)
    interior_start, interior_end = interior(low, tl.load(key_start + last_row), tl.load(key_end + first_row), BLOCK_N)

    q_tile = gather_rows(q, q_row_stride, row, HEAD_DIM, PADDED_DIM)
    acc = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)

    for i in tl.range(0, (interior_end - interior_start) // BLOCK_N):
        start = interior_start + i * BLOCK_N
        if k_tiles is not None:
            k_tile = k_tiles.load([start, (head // group) * k_head_stride])
        else:
            k_tile = load_rows(k, k_row_stride, start, high, BLOCK_N, HEAD_DIM, PADDED_DIM, False)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        if v_tiles is not None:
            v_tile = v_tiles.load([start, (head // group) * v_head_stride])
        else:
            v_tile = load_rows(v, v_row_stride, start, high, BLOCK_N, HEAD_DIM, PADDED_DIM, False)
        acc, row_sum, row_max = add_unmasked(acc, row_sum, row_max, scores, scale, v_tile)

    done = low
    while done < high:
        run_start, run_end = next_run(key_start, key_end, row, last_row, done)
        # Where there is an interior, all ranges overlap and there is one run.
        skipped = interior_end - interior_start
        row_start = tl.load(key_start + row)
        row_end = tl.minimum(tl.load(key_end + row), run_end)  # a tile may reach into the next run
        for i in tl.range(0, tl.cdiv(run_end - run_start - skipped, BORDER_N)):
            start = run_start + i * BORDER_N
            start += tl.where(start >= interior_start, skipped, 0)
            k_tile = load_rows(k, k_row_stride, start, run_end, BORDER_N, HEAD_DIM, PADDED_DIM, True)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            v_tile = load_rows(v, v_row_stride, start, run_end, BORDER_N, HEAD_DIM, PADDED_DIM, True)
            key = start + tl.arange(0, BORDER_N)
            visible = (key[None, :] >= row_start[:, None]) & (key[None, :] < row_end[:, None])
            acc, row_sum, row_max = add_masked(acc, row_sum, row_max, scores, scale, v_tile, visible)
        done = run_end

    result, log_sum = normalise(acc, row_sum, row_max)
    tl.store(lse + head.to(tl.int64) * num_queries + row, log_sum * 0.6931471805599453, mask=is_row)
    if out_row is not None:
        row = tl.load(out_row + row)
    store_rows(out + head * HEAD_DIM, out_row_stride, row, is_row, result, HEAD_DIM, PADDED_DIM)
