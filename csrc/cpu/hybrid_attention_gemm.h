// Products of small matrices, C = A B, on tiles that lie in the cache, with a block of C in registers.
//
// B and C are row-major, and their width is a whole number of vectors. A is read one element at a time, so it may be
// transposed at no cost.

#pragma once

#include "hybrid_attention_vector.h"

namespace lmf::LMF_ISA {

// Rows and vectors of the register block: all registers except a few hold sums.
constexpr int kBlockRows = kRegisters == 32 ? 8 : 4;
constexpr int kBlockVectors = 3;

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

enum class Update {
  kStore,     // C = A B
  kAdd,       // C += A B
  kScaleAdd,  // C = diag(scale) C + A B
};

// a[r, k] is at a[r * lda + k], or at a[k * lda + r] if transposed.
template <int kRows, int kVectors, bool kTransposed, Update kUpdate>
LMF_INLINE void multiply_block(
    int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
    const float* scale) {
  Vec sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec b_row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) b_row[v] = load(b + k * ldb + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float element = kTransposed ? a[k * lda + r] : a[r * lda + k];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += element * b_row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* target = c + r * ldc + v * kLanes;
      if constexpr (kUpdate == Update::kStore) store(target, sum[r][v]);
      if constexpr (kUpdate == Update::kAdd) store(target, load(target) + sum[r][v]);
      if constexpr (kUpdate == Update::kScaleAdd) store(target, load(target) * scale[r] + sum[r][v]);
    }
  }
}

template <int kRows, bool kTransposed, Update kUpdate>
void multiply_rows(
    int64_t depth, int64_t num_vectors, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
    const float* scale) {
  int64_t num_blocks = (num_vectors + kBlockVectors - 1) / kBlockVectors;
  while (num_vectors > 0) {
    const int64_t width = (num_vectors + num_blocks - 1) / num_blocks;  // equal shares: 4 is 2 + 2, not 3 + 1
    if (width == 3)
      multiply_block<kRows, 3, kTransposed, kUpdate>(depth, a, lda, b, ldb, c, ldc, scale);
    else if (width == 2)
      multiply_block<kRows, 2, kTransposed, kUpdate>(depth, a, lda, b, ldb, c, ldc, scale);
    else
      multiply_block<kRows, 1, kTransposed, kUpdate>(depth, a, lda, b, ldb, c, ldc, scale);
    b += width * kLanes;
    c += width * kLanes;
    num_vectors -= width;
    --num_blocks;
  }
}

// C [rows, num_vectors * kLanes] from A [rows, depth] and B [depth, num_vectors * kLanes], for at most kBlockRows rows.
template <bool kTransposed, Update kUpdate>
LMF_INLINE void multiply(
    int64_t rows, int64_t depth, int64_t num_vectors, const float* a, int64_t lda, const float* b, int64_t ldb,
    float* c, int64_t ldc, const float* scale = nullptr) {
  const auto part = [&](auto count) __attribute__((always_inline)) {
    constexpr int kRows = decltype(count)::value;
    multiply_rows<kRows, kTransposed, kUpdate>(depth, num_vectors, a, lda, b, ldb, c, ldc, scale);
    a += kTransposed ? kRows : kRows * lda;
    c += kRows * ldc;
    if (kUpdate == Update::kScaleAdd) scale += kRows;
    rows -= kRows;
  };
  if constexpr (kBlockRows >= 8) {
    if (rows >= 8) part(Count<8>());
  }
  if (rows >= 4) part(Count<4>());
  if (rows >= 2) part(Count<2>());
  if (rows >= 1) part(Count<1>());
}

}  // namespace lmf::LMF_ISA
