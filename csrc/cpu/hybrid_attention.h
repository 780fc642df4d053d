// The interface between the op (hybrid_attention_op.cpp) and its CPU kernels: the problem, the buffers, the tasks.
//
// A task is one key-value head and one tile of consecutive queries. A tile's rows are the queries times the H / H_kv
// heads that share the key-value head, in memory order: row r is query r / group, so neighbouring rows see nearly the
// same keys. Keys come in tiles of kKeyTile; tiles that no query sees are never touched.

#pragma once

#include <stdint.h>

#include "isa.h"

namespace lmf {

constexpr int64_t kKeyTile = 64;
constexpr int64_t kHeadPadding = 16;  // packed rows are padded to a multiple of this, which every vector width divides

struct Attention {
  const void* q;  // [num_queries, num_heads, head_dim]
  const void* k;  // [num_keys, num_kv_heads, head_dim]
  const void* v;
  bool is_bfloat16;
  const int32_t* key_start;  // [num_queries], non-decreasing, within [0, num_keys]; key_end too
  const int32_t* key_end;
  const int32_t* out_row;  // [num_queries], or null for the identity
  // A key is seen only by the queries before its visible_end. Null if no key is hidden; else padded with 0 to a whole
  // number of tiles. least_ and most_visible_end: the minimum and maximum over the keys of each tile.
  const int32_t* visible_end;
  const int32_t* least_visible_end;
  const int32_t* most_visible_end;
  // A score is (row_factor q) . k times score_factor. A scale of at most 1 goes into row_factor, a larger one into
  // score_factor, so that neither product overflows unless q . k times the scale does.
  float row_factor, score_factor;

  int64_t num_queries, num_keys, num_heads, num_kv_heads, head_dim;
  int64_t padded_dim;  // head_dim rounded up to kHeadPadding
  int64_t queries_per_tile;
  int64_t num_query_tiles;

  // Keys and values as float32, packed tile by tile: [num_kv_heads, num_packed, ...].
  const int32_t* packed_tile;  // [num_packed]: the key tiles that at least one query sees
  const int32_t* tile_slot;    // [key tiles]: index in packed_tile; undefined for tiles that are not packed
  int64_t num_packed;
  float* k_rows;     // [kKeyTile, padded_dim], times row_factor; backward only
  float* k_columns;  // [head_dim, kKeyTile]
  float* v_rows;     // [kKeyTile, padded_dim]; forward only
  float* v_columns;  // [head_dim, kKeyTile]; backward only

  float* scratch;  // scratch_size floats for each worker
  int64_t scratch_size;

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t rows_per_tile() const { return queries_per_tile * group(); }
};

struct AttentionForward : Attention {
  void* out;   // [num_queries, num_heads, head_dim]
  float* lse;  // [num_heads, num_queries]
};

struct AttentionBackward : Attention {
  const void* dout;
  const void* out;
  const float* lse;
  const int32_t* grad_key;    // [num_grad_keys], ascending
  const int32_t* first_grad;  // [key tiles + 1]: rank of the first listed key at or after the start of each key tile
  int64_t num_grad_keys;
  void* dq;
  void* dk;  // [num_grad_keys, num_kv_heads, head_dim]
  void* dv;
  float* dk_sum;  // [num_kv_heads, num_grad_keys, padded_dim], zero at first
  float* dv_sum;
  // Query tiles add to dk_sum and dv_sum in a fixed order, from the last to the first, so that results do not depend on
  // the threads. turn[h, t] is the query tile that may add to key tile t next.
  int32_t* turn;  // [num_kv_heads, key tiles]
  int64_t num_key_tiles;
};

}  // namespace lmf

// Returns the number of floats of scratch that a worker needs.
LMF_DECLARE_KERNEL(int64_t, forward_scratch, (const Attention& attention))
LMF_DECLARE_KERNEL(int64_t, backward_scratch, (const Attention& attention))

// Tasks of one step are independent; `task` counts from 0.
// num_kv_heads * num_packed tasks: fill the packed buffers that are not null.
LMF_DECLARE_KERNEL(void, pack_keys, (const Attention& attention, int64_t task))
// num_kv_heads * num_query_tiles tasks. In the backward they must begin in ascending order (see `turn`).
LMF_DECLARE_KERNEL(void, attention_forward, (const AttentionForward& problem, int64_t task, int64_t worker))
LMF_DECLARE_KERNEL(void, attention_backward, (const AttentionBackward& problem, int64_t task, int64_t worker))
// Rows [begin, end) of the num_grad_keys * num_kv_heads rows of dk and dv, from their sums.
LMF_DECLARE_KERNEL(void, store_key_grads, (const AttentionBackward& problem, int64_t begin, int64_t end))
