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
    next_stretch,
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


@triton.jit
def add_interior(
    acc,
    row_sum,
    row_max,
    q_tile,
    k,
    v,
    k_tiles,
    v_tiles,
    k_row_stride,
    v_row_stride,
    k_column,  # of the descriptors, where the head begins
    v_column,
    interior_start,
    interior_end,
    high,
    scale,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys that every row sees."""
    for i in tl.range(0, (interior_end - interior_start) // BLOCK_N):
        start = interior_start + i * BLOCK_N
        if k_tiles is not None:
            k_tile = k_tiles.load([start, k_column])
        else:
            k_tile = load_rows(k, k_row_stride, start, high, BLOCK_N, HEAD_DIM, PADDED_DIM, False)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        if v_tiles is not None:
            v_tile = v_tiles.load([start, v_column])
        else:
            v_tile = load_rows(v, v_row_stride, start, high, BLOCK_N, HEAD_DIM, PADDED_DIM, False)
        acc, row_sum, row_max = add_unmasked(acc, row_sum, row_max, scores, scale, v_tile)
    return acc, row_sum, row_max


@triton.jit
def add_border(
    acc,
    row_sum,
    row_max,
    q_tile,
    k,
    v,
    k_row_stride,
    v_row_stride,
    run_start,
    run_end,
    interior_start,
    skipped,  # keys of the interior, which are left out
    row_start,  # None: not behind run_start
    row_end,
    scale,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BORDER_N: tl.constexpr,
):
    """The other keys of [run_start, run_end), of which a row sees [row_start, row_end)."""
    for i in tl.range(0, tl.cdiv(run_end - run_start - skipped, BORDER_N)):
        start = run_start + i * BORDER_N
        start += tl.where(start >= interior_start, skipped, 0)
        k_tile = load_rows(k, k_row_stride, start, run_end, BORDER_N, HEAD_DIM, PADDED_DIM, True)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        v_tile = load_rows(v, v_row_stride, start, run_end, BORDER_N, HEAD_DIM, PADDED_DIM, True)
        key = start + tl.arange(0, BORDER_N)
        if row_start is None:
            visible = key[None, :] < row_end[:, None]
        else:
            visible = (key[None, :] >= row_start[:, None]) & (key[None, :] < row_end[:, None])
        acc, row_sum, row_max = add_masked(acc, row_sum, row_max, scores, scale, v_tile, visible)
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=["num_queries", "num_tiles", "heads_together", "group"])
def attention_forward(
    q,
    k,
    v,
    k_tiles,  # tensor descriptors of the same memory as [Nk, all heads], or None: interior tiles come by TMA
    v_tiles,
    key_start,
    key_end,
    visible_end,  # [Nk], or None if no key is hidden, and then so is the next
    stretch_end,
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

    q_tile = gather_rows(q, q_row_stride, row, HEAD_DIM, PADDED_DIM)
    acc = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)

    k_column, v_column = (head // group) * k_head_stride, (head // group) * v_head_stride
    done = low
    if visible_end is None:
        shared_low, shared_high = tl.load(key_start + last_row), tl.load(key_end + first_row)
        interior_start, interior_end = interior(low, shared_low, shared_high, BLOCK_N)
        acc, row_sum, row_max = add_interior(
            acc, row_sum, row_max, q_tile, k, v, k_tiles, v_tiles, k_row_stride, v_row_stride, k_column, v_column,
            interior_start, interior_end, high, scale, HEAD_DIM, PADDED_DIM, BLOCK_N,
        )  # fmt: skip
        while done < high:
            run_start, run_end = next_run(key_start, key_end, row, last_row, done)
            # Where there is an interior, all ranges overlap and there is one run.
            skipped = interior_end - interior_start
            row_start = tl.load(key_start + row)
            row_end = tl.minimum(tl.load(key_end + row), run_end)  # a tile may reach into the next run
            acc, row_sum, row_max = add_border(
                acc, row_sum, row_max, q_tile, k, v, k_row_stride, v_row_stride, run_start, run_end, interior_start,
                skipped, row_start, row_end, scale, HEAD_DIM, PADDED_DIM, BORDER_N,
            )  # fmt: skip
            done = run_end
    else:
        while done < high:
            end, run_end, seen_before = next_stretch(visible_end, stretch_end, done, high, first_row)
            shared_high = tl.where(seen_before > last_row, tl.minimum(tl.load(key_end + first_row), run_end), done)
            interior_start, interior_end = interior(done, done, shared_high, BLOCK_N)
            acc, row_sum, row_max = add_interior(
                acc, row_sum, row_max, q_tile, k, v, k_tiles, v_tiles, k_row_stride, v_row_stride, k_column, v_column,
                interior_start, interior_end, high, scale, HEAD_DIM, PADDED_DIM, BLOCK_N,
            )  # fmt: skip
            row_end = tl.where(row < seen_before, tl.minimum(tl.load(key_end + row), run_end), done)
            acc, row_sum, row_max = add_border(
                acc, row_sum, row_max, q_tile, k, v, k_row_stride, v_row_stride, interior_end, run_end, done, 0,
                None, row_end, scale, HEAD_DIM, PADDED_DIM, BORDER_N,
            )  # fmt: skip
            done = end

    result, log_sum = normalise(acc, row_sum, row_max)
    tl.store(lse + head.to(tl.int64) * num_queries + row, log_sum * 0.6931471805599453, mask=is_row)
    if out_row is not None:
        row = tl.load(out_row + row)
    store_rows(out + head * HEAD_DIM, out_row_stride, row, is_row, result, HEAD_DIM, PADDED_DIM)
