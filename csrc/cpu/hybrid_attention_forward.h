// Attention of one query tile, out and lse: an online softmax over the key tiles it sees.

#pragma once

#include "hybrid_attention_gemm.h"
#include "hybrid_attention_softmax.h"

namespace lmf::LMF_ISA {

// A worker's memory for one task.
struct ForwardScratch {
  float* q;        // [rows, padded_dim], times row_factor
  float* out;      // [rows, padded_dim], sums of weight * value
  float* weights;  // [kBlockRows, kKeyTile]
  float* total;    // [rows, kLanes], lane by lane: sums of weights
  float* highest;  // [rows], the largest score so far
  float* rescale;  // [kBlockRows]
  int32_t* row_start;
  int32_t* row_end;
  int64_t size;

  ForwardScratch(const Attention& a, float* memory) {
    const int64_t rows = a.rows_per_tile();
    ScratchMemory take(memory);
    q = take.floats(rows * a.padded_dim);
    out = take.floats(rows * a.padded_dim);
    weights = take.floats(kBlockRows * kKeyTile);
    total = take.floats(rows * kLanes);
    highest = take.floats(rows);
    rescale = take.floats(kBlockRows);
    row_start = take.integers(rows);
    row_end = take.integers(rows);
    size = take.next - memory;
  }
};

// Returns how many of the `count` rows from `row` on have the same first key as `row`. A block with rows of several
// documents would multiply the values between their keys (of other documents, or unused slots of a cache) by weights of
// 0, and 0 times NaN is NaN.
inline int64_t rows_of_one_document(const QueryTile& tile, int64_t row, int64_t count) {
  while (tile.row_start[row + count - 1] != tile.row_start[row]) --count;
  return count;
}

template <typename T>
void forward_task(const AttentionForward& a, int64_t task, int64_t worker) {
  const ForwardScratch s(a, a.scratch + worker * a.scratch_size);
  const QueryTile tile(a, task, s.row_start, s.row_end);
  const int64_t dim = a.padded_dim;
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    load_row(static_cast<const T*>(a.q) + tile.offset(a, row, nullptr), a.head_dim, dim, a.row_factor, s.q + row * dim);
    s.highest[row] = -kInfinity;
  }
  for (int64_t i = 0; i < tile.num_rows * dim; ++i) s.out[i] = 0.0f;
  for (int64_t i = 0; i < tile.num_rows * kLanes; ++i) s.total[i] = 0.0f;

  VisibleRows rows;
  for (int64_t key_tile = tile.first_key_tile; key_tile < tile.end_key_tile; ++key_tile) {
    const int64_t tile_start = key_tile * kKeyTile;
    rows.advance(tile, tile_start);
    const int64_t slot = packed_slot(a, tile, key_tile);
    const float* k_columns = a.k_columns + slot * a.head_dim * kKeyTile;
    const float* v_rows = a.v_rows + slot * kKeyTile * dim;
    const VisibleRows seeing = rows.without_those_behind(a, tile, key_tile);
    for (int64_t row = seeing.first, count; row < seeing.end; row += count) {
      count = rows_of_one_document(tile, row, seeing.end - row < kBlockRows ? seeing.end - row : kBlockRows);
      const ColumnRange columns(tile, row, row + count - 1, tile_start);
      const int32_t* ends = ends_for(a, tile, row + count - 1, key_tile);
      const int64_t c = columns.vector_begin;
      multiply<false, Update::kStore>(
          count, a.head_dim, columns.num_vectors(), s.q + row * dim, dim, k_columns + c, kKeyTile, s.weights + c,
          kKeyTile);
      scale_rows(a.score_factor, count, columns, s.weights);
      for (int64_t r = 0; r < count; ++r)
        softmax_row(
            s.weights + r * kKeyTile, columns, tile.row_start[row + r] - tile_start, tile.row_end[row + r] - tile_start,
            ends, static_cast<int32_t>(tile.query(a, row + r)), s.total + (row + r) * kLanes, s.highest + row + r,
            s.rescale + r);
      multiply<false, Update::kScaleAdd>(
          count, columns.end - columns.begin, dim / kLanes, s.weights + columns.begin, kKeyTile,
          v_rows + columns.begin * dim, dim, s.out + row * dim, dim, s.rescale);
    }
  }

  for (int64_t row = 0; row < tile.num_rows; ++row) {
    const float total = sum_of_lanes(load(s.total + row * kLanes));
    const float factor = total == 0.0f ? 0.0f : 1.0f / total;  // a query without keys gives 0
    store_row(s.out + row * dim, a.head_dim, factor, static_cast<T*>(a.out) + tile.offset(a, row, a.out_row));
    const double lse = s.highest[row] + __builtin_log2(total) * kLn2;  // in double, so that it is rounded only once
    a.lse[tile.lse_offset(a, row)] = static_cast<float>(lse);
  }
}

}  // namespace lmf::LMF_ISA
