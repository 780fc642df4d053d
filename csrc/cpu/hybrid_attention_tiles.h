// Tiles of rows and keys: conversion to float32, packing and transposing, and which rows see which keys.

#pragma once

#include "../elementwise/scalar.h"
#include "hybrid_attention.h"
#include "hybrid_attention_vector.h"

namespace lmf::LMF_ISA {

// Converts n elements of T to float32, times `factor`, padded with zeros.
template <typename T>
LMF_INLINE void load_row(const T* source, int64_t n, int64_t padded, float factor, float* target) {
  for (int64_t i = 0; i < n; ++i) target[i] = factor * widen(source[i]);
  for (int64_t i = n; i < padded; ++i) target[i] = 0.0f;
}

template <typename T>
LMF_INLINE void store_row(const float* source, int64_t n, float factor, T* target) {
  for (int64_t i = 0; i < n; ++i) target[i] = narrow<T>(factor * source[i]);
}

// Packs `count` keys of one head into rows [kKeyTile, padded], times `factor`, and into columns [head_dim, kKeyTile],
// each unless null. Zeros follow the keys.
template <typename T>
void pack_tile(
    const T* source, int64_t stride, int64_t count, int64_t head_dim, int64_t padded, float factor, float* rows,
    float* columns) {
  if (rows != nullptr) {
    for (int64_t j = 0; j < count; ++j) load_row(source + j * stride, head_dim, padded, factor, rows + j * padded);
    for (int64_t i = count * padded; i < kKeyTile * padded; ++i) rows[i] = 0.0f;
  }
  if (columns != nullptr) {
    for (int64_t d0 = 0; d0 < head_dim; d0 += kHeadPadding) {  // a cache line of each key at a time
      const int64_t d1 = d0 + kHeadPadding < head_dim ? d0 + kHeadPadding : head_dim;
      for (int64_t j = 0; j < count; ++j)
        for (int64_t d = d0; d < d1; ++d) columns[d * kKeyTile + j] = widen(source[j * stride + d]);
      for (int64_t d = d0; d < d1; ++d)
        for (int64_t j = count; j < kKeyTile; ++j) columns[d * kKeyTile + j] = 0.0f;
    }
  }
}

template <typename T>
void pack_keys_of(const Attention& a, int64_t task) {
  const int64_t head = task / a.num_packed;
  const int64_t first = a.packed_tile[task % a.num_packed] * kKeyTile;
  const int64_t count = a.num_keys - first < kKeyTile ? a.num_keys - first : kKeyTile;
  const int64_t stride = a.num_kv_heads * a.head_dim;
  const int64_t source = first * stride + head * a.head_dim;
  const auto at = [&](float* buffer, int64_t width) {
    return buffer == nullptr ? nullptr : buffer + task * kKeyTile * width;
  };
  pack_tile(
      static_cast<const T*>(a.k) + source, stride, count, a.head_dim, a.padded_dim, a.row_factor,
      at(a.k_rows, a.padded_dim), at(a.k_columns, a.head_dim));
  pack_tile(
      static_cast<const T*>(a.v) + source, stride, count, a.head_dim, a.padded_dim, 1.0f, at(a.v_rows, a.padded_dim),
      at(a.v_columns, a.head_dim));
}

// Hands out a worker's scratch memory in whole cache lines.
struct ScratchMemory {
  float* next;

  explicit ScratchMemory(float* memory) : next(memory) {}

  float* floats(int64_t n) {
    float* taken = next;
    next += (n + 15) / 16 * 16;
    return taken;
  }
  int32_t* integers(int64_t n) { return reinterpret_cast<int32_t*>(floats(n)); }
};

// One task: the rows of a query tile under one key-value head.
struct QueryTile {
  int64_t head;   // key-value head
  int64_t index;  // of the query tile
  int64_t first_query;
  int64_t num_rows;
  const int32_t* row_start;  // [num_rows] the range of keys that a row sees; non-decreasing
  const int32_t* row_end;
  int64_t first_key_tile, end_key_tile;

  // Writes the rows' key ranges into row_start and row_end. Task 0 is the last tile, because late tiles see most keys.
  QueryTile(const Attention& a, int64_t task, int32_t* row_start, int32_t* row_end)
      : head(task % a.num_kv_heads),
        index(a.num_query_tiles - 1 - task / a.num_kv_heads),
        first_query(index * a.queries_per_tile),
        row_start(row_start),
        row_end(row_end) {
    const int64_t left = a.num_queries - first_query, group = a.group();
    const int64_t num_queries = left < a.queries_per_tile ? left : a.queries_per_tile;
    num_rows = num_queries * group;
    for (int64_t query = 0; query < num_queries; ++query) {
      for (int64_t g = 0; g < group; ++g) {
        row_start[query * group + g] = a.key_start[first_query + query];
        row_end[query * group + g] = a.key_end[first_query + query];
      }
    }
    first_key_tile = row_start[0] / kKeyTile;
    end_key_tile = (row_end[num_rows - 1] + kKeyTile - 1) / kKeyTile;
  }

  int64_t query(const Attention& a, int64_t row) const { return first_query + row / a.group(); }

  // Offset of a row in a [num_queries, num_heads, head_dim] tensor. query_row: the order of its queries; null: as here.
  int64_t offset(const Attention& a, int64_t row, const int32_t* query_row) const {
    const int64_t at = query_row == nullptr ? query(a, row) : query_row[query(a, row)];
    return (at * a.num_heads + head * a.group() + row % a.group()) * a.head_dim;
  }

  int64_t lse_offset(const Attention& a, int64_t row) const {
    return (head * a.group() + row % a.group()) * a.num_queries + query(a, row);
  }
};

// The rows of a query tile that see something of the current key tile; key tiles are visited in ascending order.
struct VisibleRows {
  int64_t first = 0, end = 0;

  void advance(const QueryTile& tile, int64_t tile_start) {
    while (first < tile.num_rows && tile.row_end[first] <= tile_start) ++first;
    while (end < tile.num_rows && tile.row_start[end] < tile_start + kKeyTile) ++end;
  }

  // With hidden keys: without the rows after the last query that sees any key of the tile.
  VisibleRows without_those_behind(const Attention& a, const QueryTile& tile, int64_t key_tile) const {
    VisibleRows seeing = *this;
    if (a.most_visible_end == nullptr) return seeing;
    const int64_t last = (a.most_visible_end[key_tile] - tile.first_query) * a.group();
    if (seeing.end > last) seeing.end = last < first ? first : last;
    return seeing;
  }
};

// Index of a key tile of the query tile's head among the packed tiles.
inline int64_t packed_slot(const Attention& a, const QueryTile& tile, int64_t key_tile) {
  return tile.head * a.num_packed + a.tile_slot[key_tile];
}

// Returns visible_end of the keys of a tile, or null if no key of it ends before `row`: then the ranges of keys
// suffice.
inline const int32_t* ends_for(const Attention& a, const QueryTile& tile, int64_t row, int64_t key_tile) {
  if (a.visible_end == nullptr || a.least_visible_end[key_tile] > tile.query(a, row)) return nullptr;
  return a.visible_end + key_tile * kKeyTile;
}

// The columns of a key tile that a few consecutive rows see.
struct ColumnRange {
  int64_t begin, end;                // of all these rows together, exactly
  int64_t vector_begin, vector_end;  // the same in whole vectors

  ColumnRange(const QueryTile& tile, int64_t first_row, int64_t last_row, int64_t tile_start)
      : begin(clamp(tile.row_start[first_row] - tile_start)), end(clamp(tile.row_end[last_row] - tile_start)) {
    vector_begin = begin / kLanes * kLanes;
    vector_end = (end + kLanes - 1) / kLanes * kLanes;
  }

  static int64_t clamp(int64_t column) { return column < 0 ? 0 : column > kKeyTile ? kKeyTile : column; }

  int64_t num_vectors() const { return (vector_end - vector_begin) / kLanes; }
};

// Mask of the columns from `column` on that a row with the columns [begin, end) sees.
LMF_INLINE IntVec visible(int64_t column, int64_t begin, int64_t end) {
  const IntVec index = iota() + static_cast<int32_t>(column);
  return (index >= static_cast<int32_t>(begin)) & (index < static_cast<int32_t>(end));
}

}  // namespace lmf::LMF_ISA
