"""Triton kernels for decoding: few queries with long key ranges, split into many programs.

Rows of a tile are queries times the heads that share a key-value head, so each key is read once for all of them. Every
run of keys (for example, of a document in the cache) is split into `num_splits` parts, one program each, whatever its
length, so that no program depends on the lengths of other runs. A second kernel joins the parts in a fixed order.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from lmfusion_kernels.triton.hybrid_attention_forward import add_masked, exponents, normalisers
from lmfusion_kernels.triton.hybrid_attention_tiles import load_rows, next_run

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["num_queries", "num_splits"])
def attention_forward_split(
    q,
    k,
    v,
    k_tiles,  # tensor descriptors of k and v as [Nk, all heads], with tiles of BLOCK_N rows; None: loads by pointers
    v_tiles,
    key_start,
    key_end,
    parts,  # float32 [num_splits, Nq, H, D]: weighted sums of values
    parts_sum,  # float32 [num_splits, H, Nq]: sums of weights
    parts_max,  # float32 [num_splits, H, Nq]: the largest scores
    scale,  # above 0
    num_queries,
    num_splits,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of one key-value head
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    first_query = tl.program_id(2) * QUERIES
    k += kv_head.to(tl.int64) * k_head_stride
    v += kv_head.to(tl.int64) * v_head_stride

    row = tl.arange(0, QUERIES * PADDED_GROUP)
    last_query = tl.minimum(first_query + QUERIES, num_queries) - 1
    query = first_query + row // PADDED_GROUP
    head = kv_head * GROUP + row % PADDED_GROUP
    is_row = (query <= last_query) & (row % PADDED_GROUP < GROUP)
    query = tl.minimum(query, last_query)
    row_start = tl.load(key_start + query)
    row_end = tl.load(key_end + query)

    exp2_scale = scale * _LOG2_E
    column = tl.arange(0, PADDED_DIM)
    is_value = is_row[:, None] & (column < HEAD_DIM)[None, :]
    q_row = query.to(tl.int64) * q_row_stride + head * q_head_stride
    q_tile = tl.load(q + q_row[:, None] + column[None, :], mask=is_value, other=0.0)
    acc = tl.zeros([QUERIES * PADDED_GROUP, PADDED_DIM], tl.float32)
    row_sum = tl.zeros([QUERIES * PADDED_GROUP], tl.float32)
    row_max = tl.full([QUERIES * PADDED_GROUP], float("-inf"), tl.float32)

    done = tl.load(key_start + first_query)
    high = tl.load(key_end + last_query)
    while done < high:
        run_start, run_end = next_run(key_start, key_end, query, last_query, done)
        part = tl.cdiv(tl.cdiv(run_end - run_start, num_splits), BLOCK_N) * BLOCK_N
        part_start = run_start + split * part
        part_end = tl.minimum(part_start + part, run_end)
        for i in tl.range(0, tl.cdiv(part_end - part_start, BLOCK_N)):
            start = part_start + i * BLOCK_N
            if k_tiles is not None:
                k_tile = k_tiles.load([start, kv_head * k_head_stride])
            else:
                k_tile = load_rows(k, k_row_stride, start, part_end, BLOCK_N, HEAD_DIM, PADDED_DIM, True)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            if v_tiles is not None:
                # Rows after the part have arbitrary values. Their weights are 0, but 0 times NaN would be NaN.
                is_part = tl.arange(0, BLOCK_N) < part_end - start
                v_tile = tl.where(is_part[:, None], v_tiles.load([start, kv_head * v_head_stride]), 0.0)
            else:
                v_tile = load_rows(v, v_row_stride, start, part_end, BLOCK_N, HEAD_DIM, PADDED_DIM, True)
            key = start + tl.arange(0, BLOCK_N)
            visible = (key[None, :] >= row_start[:, None]) & (key[None, :] < tl.minimum(row_end, part_end)[:, None])
            acc, row_sum, row_max = add_masked(acc, row_sum, row_max, scores, exp2_scale, v_tile, visible)
        done = run_end

    sum_row = (split.to(tl.int64) * NUM_HEADS + head) * num_queries + query
    tl.store(parts_sum + sum_row, row_sum, mask=is_row)
    tl.store(parts_max + sum_row, row_max, mask=is_row)
    value_row = ((split.to(tl.int64) * num_queries + query) * NUM_HEADS + head) * HEAD_DIM
    tl.store(parts + value_row[:, None] + column[None, :], acc, mask=is_value)


@triton.jit(do_not_specialize=["num_queries", "num_splits"])
def join_splits(
    parts,
    parts_sum,
    parts_max,
    out_row,
    out,
    lse,
    scale,
    num_queries,
    num_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
):
    """Add the sums of all parts, each with the weight of its largest score: one program per query and head."""
    query = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.arange(0, PADDED_SPLITS)
    column = tl.arange(0, PADDED_DIM)
    is_part = split < num_splits
    sum_row = (split.to(tl.int64) * NUM_HEADS + head) * num_queries + query
    sums = tl.load(parts_sum + sum_row, mask=is_part, other=0.0)
    largest = tl.load(parts_max + sum_row, mask=is_part, other=float("-inf"))
    row_max = tl.max(largest, axis=0)
    _, references = exponents(largest, scale * _LOG2_E)
    _, reference = exponents(tl.where(row_max == float("-inf"), 0.0, row_max), scale * _LOG2_E)
    weights = tl.math.exp2(references - reference)
    part_row = ((split.to(tl.int64) * num_queries + query) * NUM_HEADS + head) * HEAD_DIM
    is_value = is_part[:, None] & (column < HEAD_DIM)[None, :]
    values = tl.load(parts + part_row[:, None] + column[None, :], mask=is_value, other=0.0)
    acc = tl.sum(values * weights[:, None], axis=0)

    inverse_sum, log_sum = normalisers(tl.sum(sums * weights, axis=0), row_max, scale)
    tl.store(lse + head.to(tl.int64) * num_queries + query, log_sum)
    row = query
    if out_row is not None:
        row = tl.load(out_row + query).to(tl.int64)
    out_pointers = out + (row * NUM_HEADS + head) * HEAD_DIM + column
    tl.store(out_pointers, (acc * inverse_sum).to(out.dtype.element_ty), mask=column < HEAD_DIM)
