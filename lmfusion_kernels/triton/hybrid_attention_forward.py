"""The forward attention kernel in Triton: one program per query tile and head.

Keys come in tiles. The tiles that every row of the query tile sees come first, without a mask, then the others with
one. The softmax is kept as a running maximum and sum per row, so the order of tiles does not matter. Weights are
computed with exp2, which is one instruction.
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
_LN_2 = tl.constexpr(0.6931471805599453)
_LARGE = tl.constexpr(2.0**28)


@triton.jit
def exponents(row_max, exp2_scale):
    """(multiplier, reference) of rows whose largest scores are row_max.

    Weights are exp2(score * multiplier - reference), a fused multiply-add. The multiplier is exp2_scale, the reference
    the largest scaled score. The reference is rounded, so all weights of a row have two to the power of its error as a
    factor. The factor cancels when the row is divided by its sum, but it leaves the range of float32 if scaled scores
    are beyond 2^31. From 2^28 on, float32 scores that differ at all differ by 16 or more in the exponent, so the
    largest has all the weight, with any multiplier that is not smaller. There the multiplier becomes a power of two,
    which makes the reference exact."""
    # The next power of two: a mantissa other than zero carries into the exponent.
    bits = tl.cast(exp2_scale, tl.int32, bitcast=True)
    power = tl.cast((bits + 0x7FFFFF) & 0x7F800000, tl.float32, bitcast=True)
    multiplier = tl.where(tl.abs(row_max * exp2_scale) < _LARGE, exp2_scale, power)
    # fma and not a plain product: that could be fused with the subtraction of another reference, without rounding.
    return multiplier, tl.fma(row_max, multiplier, 0.0)


@triton.jit
def add_unmasked(acc, row_sum, row_max, scores, exp2_scale, v):
    """Add a key tile to the running softmax. row_max is the largest score so far; exp2_scale > 0."""
    _, old_reference = exponents(row_max, exp2_scale)
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    multiplier, reference = exponents(new_max, exp2_scale)
    weights = tl.math.exp2(tl.fma(scores, multiplier[:, None], -reference[:, None]))
    correction = tl.math.exp2(old_reference - reference)
    row_sum = row_sum * correction + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * correction[:, None], input_precision="ieee")
    return acc, row_sum, new_max


@triton.jit
def add_masked(acc, row_sum, row_max, scores, exp2_scale, v, visible):
    """Like add_unmasked, if some rows may see no key of the tile, or none so far."""
    _, old_reference = exponents(row_max, exp2_scale)
    scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    multiplier, reference = exponents(tl.where(new_max == float("-inf"), 0.0, new_max), exp2_scale)
    weights = tl.math.exp2(tl.fma(scores, multiplier[:, None], -reference[:, None]))
    correction = tl.math.exp2(old_reference - reference)
    row_sum = row_sum * correction + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * correction[:, None], input_precision="ieee")
    return acc, row_sum, new_max


@triton.jit
def normalisers(row_sum, row_max, scale):
    """The factors of the sums of weighted values, and the log of the sum of exp(scale * score).

    The log is -inf for a row that sees no key.
    """
    seen = row_sum != 0.0  # NaN stays NaN
    safe_sum = tl.where(seen, row_sum, 1.0)
    multiplier, reference = exponents(row_max, scale * _LOG2_E)
    rounding = tl.fma(row_max, multiplier, -reference)  # 2^rounding is a factor of row_sum
    log_sum = row_max * scale + (tl.math.log2(safe_sum) - rounding) * _LN_2
    return 1.0 / safe_sum, tl.where(seen, log_sum, float("-inf"))


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
    k_column,  # the first column of the head in the descriptors
    v_column,
    interior_start,
    interior_end,
    high,
    exp2_scale,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the keys that every row sees."""
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
        acc, row_sum, row_max = add_unmasked(acc, row_sum, row_max, scores, exp2_scale, v_tile)
    return acc, row_sum, row_max


@triton.jit
def add_border(
    acc,
    row_sum,
    row_max,
    q_tile,
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
    exp2_scale,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BORDER_N: tl.constexpr,
):
    """Add the other keys of [run_start, run_end), of which a row sees [row_start, row_end)."""
    for i in tl.range(0, tl.cdiv(run_end - run_start - skipped, BORDER_N)):
        start = run_start + i * BORDER_N
        start += tl.where(start >= interior_start, skipped, 0)
        key = start + tl.arange(0, BORDER_N)
        if k_border is not None:
            k_tile = k_border.load([start, k_column])
        else:
            k_tile = load_rows(k, k_row_stride, start, run_end, BORDER_N, HEAD_DIM, PADDED_DIM, True)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        if v_border is not None:
            # Rows after the run have arbitrary values. Their weights are 0, but 0 times NaN would be NaN.
            is_run = tl.arange(0, BORDER_N) < run_end - start
            v_tile = tl.where(is_run[:, None], v_border.load([start, v_column]), 0.0)
        else:
            v_tile = load_rows(v, v_row_stride, start, run_end, BORDER_N, HEAD_DIM, PADDED_DIM, True)
        if row_start is None:
            visible = key[None, :] < row_end[:, None]
        else:
            visible = (key[None, :] >= row_start[:, None]) & (key[None, :] < row_end[:, None])
        acc, row_sum, row_max = add_masked(acc, row_sum, row_max, scores, exp2_scale, v_tile, visible)
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=["num_queries", "num_tiles", "concurrent_heads", "group"])
def attention_forward(
    q,
    k,
    v,
    k_tiles,  # tensor descriptors of k and v as [Nk, all heads], with tiles of BLOCK_N rows; None: loads by pointers
    v_tiles,
    k_border,  # the same with tiles of BORDER_N rows
    v_border,
    key_start,
    key_end,
    visible_end,  # [Nk]; None, as run_end, if no key is hidden
    run_end,
    out_row,
    out,
    lse,
    scale,  # above 0
    num_queries,
    num_tiles,
    concurrent_heads,
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
    tile, head = tile_and_head(num_tiles, concurrent_heads)
    q += head.to(tl.int64) * q_head_stride
    k += (head // group).to(tl.int64) * k_head_stride
    v += (head // group).to(tl.int64) * v_head_stride

    first_row = tile * BLOCK_M
    last_row = tl.minimum(first_row + BLOCK_M, num_queries) - 1
    row = first_row + tl.arange(0, BLOCK_M)
    is_row = row <= last_row
    row = tl.minimum(row, last_row)  # rows after the last one repeat it and are not stored
    low = tl.load(key_start + first_row)
    high = tl.load(key_end + last_row)

    exp2_scale = scale * _LOG2_E
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
            interior_start, interior_end, high, exp2_scale, HEAD_DIM, PADDED_DIM, BLOCK_N,
        )  # fmt: skip
        while done < high:
            keys_start, keys_end = next_run(key_start, key_end, row, last_row, done)
            # If there is an interior, all ranges overlap and there is only one run.
            skipped = interior_end - interior_start
            row_start = tl.load(key_start + row)
            row_end = tl.minimum(tl.load(key_end + row), keys_end)  # a tile may reach into the next run
            acc, row_sum, row_max = add_border(
                acc, row_sum, row_max, q_tile, k, v, k_border, v_border, k_row_stride, v_row_stride, k_column, v_column,
                keys_start, keys_end, interior_start, skipped, row_start, row_end, exp2_scale, HEAD_DIM, PADDED_DIM,
                BORDER_N,
            )  # fmt: skip
            done = keys_end
    else:
        while done < high:
            end, keys_end, hidden_from = next_section(visible_end, run_end, done, high, first_row)
            shared_high = tl.where(hidden_from > last_row, tl.minimum(tl.load(key_end + first_row), keys_end), done)
            interior_start, interior_end = interior(done, done, shared_high, BLOCK_N)
            acc, row_sum, row_max = add_interior(
                acc, row_sum, row_max, q_tile, k, v, k_tiles, v_tiles, k_row_stride, v_row_stride, k_column, v_column,
                interior_start, interior_end, high, exp2_scale, HEAD_DIM, PADDED_DIM, BLOCK_N,
            )  # fmt: skip
            row_end = tl.where(row < hidden_from, tl.minimum(tl.load(key_end + row), keys_end), done)
            acc, row_sum, row_max = add_border(
                acc, row_sum, row_max, q_tile, k, v, k_border, v_border, k_row_stride, v_row_stride, k_column, v_column,
                interior_end, keys_end, done, 0, None, row_end, exp2_scale, HEAD_DIM, PADDED_DIM, BORDER_N,
            )  # fmt: skip
            done = end

    inverse_sum, log_sum = normalisers(row_sum, row_max, scale)
    tl.store(lse + head.to(tl.int64) * num_queries + row, log_sum, mask=is_row)
    if out_row is not None:
        row = tl.load(out_row + row)
    store_rows(out + head * HEAD_DIM, out_row_stride, row, is_row, acc * inverse_sum[:, None], HEAD_DIM, PADDED_DIM)
