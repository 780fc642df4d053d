// Gradients of one query tile, in one pass over the key tiles it sees: its own dq, and its share of dk and dv. If
// scores are large, an earlier pass recomputes the sums of their softmax.

#pragma once

#include <sched.h>

#include "hybrid_attention_gemm.h"
#include "hybrid_attention_softmax.h"

namespace lmf::LMF_ISA {

// A worker's memory for one task.
struct BackwardScratch {
  float* q;           // [rows, padded_dim], times row_factor
  float* dout;        // [rows, padded_dim]
  float* dq;          // [rows, padded_dim]
  float* weights;     // [rows, kKeyTile]
  float* dscores;     // [rows, kKeyTile], of (row_factor q) . k
  float* shift;       // [rows], shift and log2_total: see softmax_backward_row
  float* log2_total;  // [rows]
  float* total;       // [rows, kLanes], see find_totals
  float* delta;       // [rows], the row's sum of dout * out
  int32_t* row_start;
  int32_t* row_end;
  int64_t size;

  BackwardScratch(const Attention& a, float* memory) {
    const int64_t rows = a.rows_per_tile();
    ScratchMemory take(memory);
    q = take.floats(rows * a.padded_dim);
    dout = take.floats(rows * a.padded_dim);
    dq = take.floats(rows * a.padded_dim);
    weights = take.floats(rows * kKeyTile);
    dscores = take.floats(rows * kKeyTile);
    shift = take.floats(rows);
    log2_total = take.floats(rows);
    total = take.floats(rows * kLanes);
    delta = take.floats(rows);
    row_start = take.integers(rows);
    row_end = take.integers(rows);
    size = take.next - memory;
  }
};

// lse = highest score + log(total) is one float32 of 24 bits. Above this limit rounding it would change log(total) by
// more than 2^-18, and beyond 2^24 nothing of log(total) would be left.
constexpr float kLargestLse = 128.0f;

// Finds shift and log2_total, which turn scores into weights: from lse, or, if lse is too large for one of the rows,
// from the highest score and the sum of exp(score - highest), which are computed again from the scores.
inline void find_totals(const AttentionBackward& a, const BackwardScratch& s, const QueryTile& tile) {
  bool is_large = false;
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    const float lse = a.lse[tile.lse_offset(a, row)];
    s.shift[row] = shift_of(lse);
    s.log2_total[row] = 0.0f;
    is_large |= __builtin_fabsf(s.shift[row]) > kLargestLse;
  }
  if (!is_large) return;
  for (int64_t row = 0; row < tile.num_rows; ++row) s.shift[row] = -kInfinity;
  for (int64_t i = 0; i < tile.num_rows * kLanes; ++i) s.total[i] = 0.0f;
  VisibleRows rows;
  for (int64_t key_tile = tile.first_key_tile; key_tile < tile.end_key_tile; ++key_tile) {
    const int64_t tile_start = key_tile * kKeyTile;
    rows.advance(tile, tile_start);
    const float* k_columns = a.k_columns + packed_slot(a, tile, key_tile) * a.head_dim * kKeyTile;
    const VisibleRows seeing = rows.without_those_behind(a, tile, key_tile);
    for (int64_t row = seeing.first, count; row < seeing.end; row += count) {
      count = seeing.end - row < kBlockRows ? seeing.end - row : kBlockRows;
      const ColumnRange columns(tile, row, row + count - 1, tile_start);
      const int32_t* ends = ends_for(a, tile, row + count - 1, key_tile);
      const int64_t c = columns.vector_begin;
      multiply<false, Update::kStore>(
          count, a.head_dim, columns.num_vectors(), s.q + row * a.padded_dim, a.padded_dim, k_columns + c, kKeyTile,
          s.weights + c, kKeyTile);
      scale_rows(a.score_factor, count, columns, s.weights);
      for (int64_t r = 0; r < count; ++r) {
        float rescale;
        softmax_row(
            s.weights + r * kKeyTile, columns, tile.row_start[row + r] - tile_start, tile.row_end[row + r] - tile_start,
            ends, static_cast<int32_t>(tile.query(a, row + r)), s.total + (row + r) * kLanes, s.shift + row + r,
            &rescale);
      }
    }
  }
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    const float total = sum_of_lanes(load(s.total + row * kLanes));
    s.shift[row] = shift_of(s.shift[row]);
    s.log2_total[row] = total == 0.0f ? 0.0f : static_cast<float>(__builtin_log2(total));
  }
}

// Adds weights^T dout to dv and dscores^T q to dk for the listed keys of a key tile: up to kBlockRows consecutive keys
// at a time, over the rows that see any of them.
inline void add_key_grads(
    const AttentionBackward& a, const BackwardScratch& s, const QueryTile& tile, int64_t key_tile,
    const VisibleRows& rows) {
  const int64_t dim = a.padded_dim, tile_start = key_tile * kKeyTile;
  const int64_t end = a.first_grad[key_tile + 1];
  VisibleRows seeing = rows;
  seeing.end = rows.first;
  for (int64_t rank = a.first_grad[key_tile]; rank < end;) {
    const int32_t first_key = a.grad_key[rank];
    int64_t count = 1;
    while (count < kBlockRows && rank + count < end && a.grad_key[rank + count] == first_key + count) ++count;
    while (seeing.first < rows.end && tile.row_end[seeing.first] <= first_key) ++seeing.first;
    while (seeing.end < rows.end && tile.row_start[seeing.end] < first_key + count) ++seeing.end;
    const int64_t depth = seeing.end - seeing.first, column = first_key - tile_start;
    if (depth > 0) {
      const int64_t target = (tile.head * a.num_grad_keys + rank) * dim;
      multiply<true, Update::kAdd>(
          count, depth, dim / kLanes, s.weights + seeing.first * kKeyTile + column, kKeyTile,
          s.dout + seeing.first * dim, dim, a.dv_sum + target, dim);
      multiply<true, Update::kAdd>(
          count, depth, dim / kLanes, s.dscores + seeing.first * kKeyTile + column, kKeyTile, s.q + seeing.first * dim,
          dim, a.dk_sum + target, dim);
    }
    rank += count;
  }
}

template <typename T>
void backward_task(const AttentionBackward& a, int64_t task, int64_t worker) {
  const BackwardScratch s(a, a.scratch + worker * a.scratch_size);
  const QueryTile tile(a, task, s.row_start, s.row_end);
  const int64_t dim = a.padded_dim;
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    load_row(static_cast<const T*>(a.q) + tile.offset(a, row, nullptr), a.head_dim, dim, a.row_factor, s.q + row * dim);
    const int64_t result = tile.offset(a, row, a.out_row);
    load_row(static_cast<const T*>(a.dout) + result, a.head_dim, dim, 1.0f, s.dout + row * dim);
    load_row(static_cast<const T*>(a.out) + result, a.head_dim, dim, 1.0f, s.dq + row * dim);
    Vec product{};
    for (int64_t d = 0; d < dim; d += kLanes) product += load(s.dout + row * dim + d) * load(s.dq + row * dim + d);
    s.delta[row] = sum_of_lanes(product);
    for (int64_t d = 0; d < dim; d += kLanes) store(s.dq + row * dim + d, Vec{});
  }
  find_totals(a, s, tile);

  VisibleRows rows;
  for (int64_t key_tile = tile.first_key_tile; key_tile < tile.end_key_tile; ++key_tile) {
    const int64_t tile_start = key_tile * kKeyTile;
    rows.advance(tile, tile_start);
    const int64_t slot = packed_slot(a, tile, key_tile);
    const float* k_rows = a.k_rows + slot * kKeyTile * dim;
    const float* k_columns = a.k_columns + slot * a.head_dim * kKeyTile;
    const float* v_columns = a.v_columns + slot * a.head_dim * kKeyTile;
    const VisibleRows seeing = rows.without_those_behind(a, tile, key_tile);
    for (int64_t row = seeing.first; row < seeing.end; row += kBlockRows) {
      const int64_t count = seeing.end - row < kBlockRows ? seeing.end - row : kBlockRows;
      const ColumnRange columns(tile, row, row + count - 1, tile_start);
      const int32_t* ends = ends_for(a, tile, row + count - 1, key_tile);
      float* weights = s.weights + row * kKeyTile;
      float* dscores = s.dscores + row * kKeyTile;
      const int64_t c = columns.vector_begin;
      multiply<false, Update::kStore>(
          count, a.head_dim, columns.num_vectors(), s.q + row * dim, dim, k_columns + c, kKeyTile, weights + c,
          kKeyTile);
      scale_rows(a.score_factor, count, columns, weights);
      multiply<false, Update::kStore>(
          count, a.head_dim, columns.num_vectors(), s.dout + row * dim, dim, v_columns + c, kKeyTile, dscores + c,
          kKeyTile);
      for (int64_t r = 0; r < count; ++r)
        softmax_backward_row(
            weights + r * kKeyTile, dscores + r * kKeyTile, columns, tile.row_start[row + r] - tile_start,
            tile.row_end[row + r] - tile_start, ends, static_cast<int32_t>(tile.query(a, row + r)), s.shift[row + r],
            s.log2_total[row + r], s.delta[row + r]);
      scale_rows(a.score_factor, count, columns, dscores);
      multiply<false, Update::kAdd>(
          count, columns.end - columns.begin, dim / kLanes, dscores + columns.begin, kKeyTile,
          k_rows + columns.begin * dim, dim, s.dq + row * dim, dim);
    }
    if (a.first_grad[key_tile] == a.first_grad[key_tile + 1]) continue;
    int32_t* turn = a.turn + tile.head * a.num_key_tiles + key_tile;
    // The task whose turn it is began before this one and waits only for tasks that began earlier still, so this ends.
    while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != tile.index) sched_yield();
    add_key_grads(a, s, tile, key_tile, seeing);
    __atomic_store_n(turn, static_cast<int32_t>(tile.index - 1), __ATOMIC_RELEASE);
  }

  for (int64_t row = 0; row < tile.num_rows; ++row)
    store_row(s.dq + row * dim, a.head_dim, 1.0f, static_cast<T*>(a.dq) + tile.offset(a, row, nullptr));
}

template <typename T>
void store_key_grads_of(const AttentionBackward& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t source = (row % a.num_kv_heads * a.num_grad_keys + row / a.num_kv_heads) * a.padded_dim;
    store_row(a.dk_sum + source, a.head_dim, 1.0f, static_cast<T*>(a.dk) + row * a.head_dim);
    store_row(a.dv_sum + source, a.head_dim, 1.0f, static_cast<T*>(a.dv) + row * a.head_dim);
  }
}

}  // namespace lmf::LMF_ISA
