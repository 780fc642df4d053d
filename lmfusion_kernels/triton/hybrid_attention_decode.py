"""How do few queries attend to long key ranges? Kernels for generation: many programs although there are few queries.

Rows of a tile are queries times the heads that share a key-value head, so each key is read once for all of them. Every
run of keys (of a document in the cache, say) is cut into `num_splits` parts, one program each, whatever its length: no
program needs to know the lengths of the others. A second kernel joins the parts in a fixed order.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from lmfusion_kernels.triton.hybrid_attention_forward import add_masked, normalise
from lmfusion_kernels.triton.hybrid_attention_tiles import load_rows, next_run


@triton.jit(do_not_specialize=["num_queries", "num_splits"])
def attention_forward_split(
    q,
    k,
    v,
    key_start,
    key_end,
    out,  # float32 [num_splits, Nq, H, D]: the result of each part
    lse,  # float32 [num_splits, H, Nq], in base 2
    scale,  # times log2(e), not negative
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
            k_tile = load_rows(k, k_row_stride, start, part_end, BLOCK_N, HEAD_DIM, PADDED_DIM, True)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            v_tile = load_rows(v, v_row_stride, start, part_end, BLOCK_N, HEAD_DIM, PADDED_DIM, True)
            key = start + tl.arange(0, BLOCK_N)
            visible = (key[None, :] >= row_start[:, None]) & (key[None, :] < tl.minimum(row_end, part_end)[:, None])
            acc, row_sum, row_max = add_masked(acc, row_sum, row_max, scores, scale, v_tile, visible)
        done = run_end

    result, log_sum = normalise(acc, row_sum, row_max)
    lse_row = (split.to(tl.int64) * NUM_HEADS + head) * num_queries + query
    tl.store(lse + lse_row, log_sum, mask=is_row)
    value_row = ((split.to(tl.int64) * num_queries + query) * NUM_HEADS + head) * HEAD_DIM
    tl.store(out + value_row[:, None] + column[None, :], result, mask=is_value)


@triton.jit(do_not_specialize=["num_queries", "num_splits"])
def join_splits(
    parts,
    parts_lse,
    out_row,
    out,
    lse,
    num_queries,
    num_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
):
    """One program for each query and head: the parts, weighted by the sums of their weights."""
    query = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.arange(0, PADDED_SPLITS)
    column = tl.arange(0, PADDED_DIM)
    log_sums = tl.load(
        parts_lse + (split.to(tl.int64) * NUM_HEADS + head) * num_queries + query,
        mask=split < num_splits,
        other=float("-inf"),
    )
    largest = tl.max(log_sums, axis=0)
    weights = tl.math.exp2(log_sums - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(weights, axis=0)
    is_seen = total > 0.0
    safe_total = tl.where(is_seen, total, 1.0)
    part_row = ((split.to(tl.int64) * num_queries + query) * NUM_HEADS + head) * HEAD_DIM
    is_value = (split < num_splits)[:, None] & (column < HEAD_DIM)[None, :]
    values = tl.load(parts + part_row[:, None] + column[None, :], mask=is_value, other=0.0)
    result = tl.sum(values * weights[:, None], axis=0) / safe_total

    log_sum = tl.where(is_seen, largest + tl.math.log2(safe_total), float("-inf"))
    tl.store(lse + head.to(tl.int64) * num_queries + query, log_sum * 0.6931471805599453)
    row = query
    if out_row is not None:
        row = tl.load(out_row + query).to(tl.int64)
    out_pointers = out + (row * NUM_HEADS + head) * HEAD_DIM + column
    tl.store(out_pointers, result.to(out.dtype.element_ty), mask=column < HEAD_DIM)
