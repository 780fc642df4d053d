// The CPU kernels of RoPE, QK norm and the reordering between tower and sequence order. Each call works on one thread.

#pragma once

#include <cstdint>

#include "../elementwise/scalar.h"
#include "isa.h"

namespace lmf {

struct HeadCounts {
  int64_t num_heads, num_kv_heads, head_dim;
};

// Rows of one tower. A row of qkv holds the heads of q, then k, then v.
template <typename T>
struct RopeReorderRows {
  const T* qkv;
  const float* cos;  // [N, head_dim / 2] by sequence index, as sin
  const float* sin;
  const int32_t* sequence_row;  // by row: its sequence index, row of cos and sin
  const int32_t* query_row;     // by row: below num_constant a row of q_constant, else num_constant plus a row of q
  const int32_t* key_slot;      // by sequence index: row of k and v; null: the index
  const T* q_norm;              // [head_dim]; null: none, as k_norm
  const T* k_norm;
  T* q_constant;
  T* q;
  T* k;
  T* v;
  int64_t num_rows, num_constant;
  HeadCounts heads;
  float eps;
};

// Index 0 of an array of two is the text tower, 1 the image tower.
template <typename T>
struct RopeReorderBackwardRows {
  const T* dq;  // by rank, as dk and dv
  const T* dk;
  const T* dv;
  const T* qkv[2];  // read with norms only
  const float* cos;
  const float* sin;
  const int32_t* active_row;  // by rank: row of dqkv, the text tower's num_text rows first
  const int32_t* active_key;  // by rank: row of cos and sin; null: the rank
  const T* q_norm[2];
  const T* k_norm[2];
  T* dqkv[2];
  float* dq_norm[2];  // [head_dim], increased by the sum over these ranks; null: not wanted
  float* dk_norm[2];
  int64_t begin, end;  // ranks
  int64_t num_text;
  HeadCounts heads;
  float eps;
};

}  // namespace lmf

LMF_DECLARE_KERNEL(void, rope_reorder_rows, (const RopeReorderRows<float>& rows))
LMF_DECLARE_KERNEL(void, rope_reorder_rows, (const RopeReorderRows<bfloat16>& rows))
LMF_DECLARE_KERNEL(void, rope_reorder_backward_rows, (const RopeReorderBackwardRows<float>& rows))
LMF_DECLARE_KERNEL(void, rope_reorder_backward_rows, (const RopeReorderBackwardRows<bfloat16>& rows))
