// Builds the index vectors of lmfusion_kernels.TokenLayout from the spans of a packed batch, in one pass over the
// tokens. The documentation of TokenLayout describes the vectors.

#pragma once

#include <cstdint>

namespace lmf {

enum SpanKind : uint8_t { kText = 0, kImage = 1, kMarker = 2 };
enum SegmentMode : uint8_t { kFull = 1, kHidden = 2 };  // bits

struct Spans {
  const uint8_t* kind;
  const int32_t* length;
  const int32_t* document;  // non-decreasing from 0
  int64_t num_spans;
  // Spans with one segment number, all of one document, form a segment and have its mode. If both are null, every span
  // is a segment, images are full, and none is hidden.
  const int32_t* segment;  // ascending from 0
  const uint8_t* mode;

  bool is_full(int64_t span) const { return mode == nullptr ? kind[span] == kImage : (mode[span] & kFull) != 0; }
  bool is_hidden(int64_t span) const { return mode != nullptr && (mode[span] & kHidden) != 0; }
  bool joins_previous(int64_t span) const {
    return segment != nullptr && span > 0 && segment[span] == segment[span - 1];
  }
};

struct Cache {
  const int32_t* length;  // tokens that each document already has in the cache; null: no cache
  const int32_t* start;   // first cache slot of each document
  int32_t num_slots;      // of the cache
};

struct LayoutCounts {
  int64_t num_tokens, num_text, num_constant;
  int64_t num_documents, num_triangles, num_triangle_rows;
  int64_t longest_active, longest_triangle;
  int64_t num_hidden_segments, num_part_keys;  // no part keys if nothing is hidden
};

struct LayoutVectors {
  int32_t *tower_to_sequence, *sequence_to_tower, *position, *key_start, *key_end, *key_slot, *query_row;
  int32_t *constant_key_start, *constant_key_end;
  int32_t *active_key_start, *active_key_end, *active_key, *active_row;
  int32_t *query_start, *query_end, *active_query_start, *active_query_end;  // null with a cache
  int32_t *document_start, *document_key_start, *document_num_keys, *active_document_start;
  int32_t *triangle_start, *triangle_row, *active_triangle_row;
  // Null if nothing is hidden.
  int32_t *visible_end, *constant_visible_end, *active_visible_end, *run_end;
  int32_t *part_start, *part_row, *part_key_start, *part_key;
  int32_t *active_part_start, *active_part_row, *constant_part_row, *constant_part_num_keys;
};

LayoutCounts count_tokens(const Spans& spans, bool frozen_text, const Cache& cache);

void fill_layout(
    const Spans& spans, bool frozen_text, const Cache& cache, const LayoutCounts& counts, const LayoutVectors& out);

}  // namespace lmf
