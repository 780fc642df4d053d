// Turns the scores of one row into weights of a softmax, in the forward and again in the backward.
//
// The highest score is subtracted before anything is multiplied: a product of a score beyond 2^24 with log2(e) has an
// error of more than 1, so the difference of two such products would be useless as an exponent.

#pragma once

#include "hybrid_attention_tiles.h"

namespace lmf::LMF_ISA {

constexpr float kInfinity = __builtin_inff();

// Returns what to subtract from the scores of a row before the exponential: the highest of them, or 0 if all are
// -infinity, which leaves weights of 0.
LMF_INLINE float shift_of(float highest) { return highest == -kInfinity ? 0.0f : highest; }

// Multiplies rows of scores, or of their gradients, by `factor`, over the vectors of `columns`. Mostly it is 1.
LMF_INLINE void scale_rows(float factor, int64_t count, const ColumnRange& columns, float* scores) {
  if (factor == 1.0f) return;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = columns.vector_begin; c < columns.vector_end; c += kLanes)
      store(scores + r * kKeyTile + c, load(scores + r * kKeyTile + c) * factor);
}

// Turns the scores of one row, over the vectors of `columns`, into weights exp(score - highest). The row sees the
// columns [begin, end); if `ends` is not null, only those of them with query < ends[column].
LMF_INLINE void softmax_row(
    float* scores, const ColumnRange& columns, int64_t begin, int64_t end, const int32_t* ends, int32_t query,
    float* total, float* highest, float* rescale) {
  if (begin > columns.vector_begin || end < columns.vector_end) {
    for (int64_t c = columns.vector_begin; c < columns.vector_end; c += kLanes)
      store(scores + c, select(visible(c, begin, end), load(scores + c), broadcast(-kInfinity)));
  }
  if (ends != nullptr) {
    for (int64_t c = columns.vector_begin; c < columns.vector_end; c += kLanes)
      store(scores + c, select(load(ends + c) > query, load(scores + c), broadcast(-kInfinity)));
  }
  Vec largest = broadcast(-kInfinity);
  for (int64_t c = columns.vector_begin; c < columns.vector_end; c += kLanes)
    largest = maximum(load(scores + c), largest);
  const float before = *highest;
  const float tile_highest = max_of_lanes(largest);
  const float now = tile_highest > before ? tile_highest : before;
  *highest = now;
  const Vec shift = broadcast(shift_of(now));
  *rescale = now == before ? 1.0f : exp2((broadcast(before) - shift) * kLog2e)[0];
  Vec sum = load(total) * *rescale;
  for (int64_t c = columns.vector_begin; c < columns.vector_end; c += kLanes) {
    const Vec weight = exp2((load(scores + c) - shift) * kLog2e);
    sum += weight;
    store(scores + c, weight);
  }
  store(total, sum);
}

// Turns scores into weights exp(score - shift) / 2^log2_total, and gradients of weights into gradients of scores, over
// all columns of the key tile. Columns that the row does not see become 0, so that products over rows need no mask.
// `ends` and `query`: see softmax_row.
LMF_INLINE void softmax_backward_row(
    float* weights, float* dscores, const ColumnRange& columns, int64_t begin, int64_t end, const int32_t* ends,
    int32_t query, float shift, float log2_total, float delta) {
  const auto weight_of = [&](Vec score) __attribute__((always_inline)) {
    return exp2((score - shift) * kLog2e - log2_total);
  };
  for (int64_t c = 0; c < columns.vector_begin; c += kLanes) {
    store(weights + c, Vec{});
    store(dscores + c, Vec{});
  }
  if (begin > columns.vector_begin || end < columns.vector_end) {
    for (int64_t c = columns.vector_begin; c < columns.vector_end; c += kLanes) {
      const IntVec seen = visible(c, begin, end);
      const Vec weight = select(seen, weight_of(load(weights + c)), Vec{});
      store(dscores + c, select(seen, weight * (load(dscores + c) - delta), Vec{}));
      store(weights + c, weight);
    }
  } else {
    for (int64_t c = columns.vector_begin; c < columns.vector_end; c += kLanes) {
      const Vec weight = weight_of(load(weights + c));
      store(dscores + c, weight * (load(dscores + c) - delta));
      store(weights + c, weight);
    }
  }
  if (ends != nullptr) {
    for (int64_t c = columns.vector_begin; c < columns.vector_end; c += kLanes) {
      const IntVec seen = load(ends + c) > query;
      store(weights + c, select(seen, load(weights + c), Vec{}));
      store(dscores + c, select(seen, load(dscores + c), Vec{}));
    }
  }
  for (int64_t c = columns.vector_end; c < kKeyTile; c += kLanes) {
    store(weights + c, Vec{});
    store(dscores + c, Vec{});
  }
}

}  // namespace lmf::LMF_ISA
