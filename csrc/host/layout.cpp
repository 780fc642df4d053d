#include "layout.h"

#include <algorithm>

namespace lmf {
namespace {

// Calls f(first_span, end_span, start, num_constant, num_tokens) for each document. Its constant rows are a prefix: the
// text before its first image or marker. A layout with a cache has no backward, so nothing to leave out of one.
template <class F>
void for_each_document(const Spans& spans, bool has_constant, F f) {
  int64_t start = 0;
  for (int64_t first = 0; first < spans.num_spans;) {
    int64_t end = first, num_tokens = 0, num_constant = 0;
    bool is_constant = has_constant;
    for (; end < spans.num_spans && spans.document[end] == spans.document[first]; ++end) {
      is_constant = is_constant && spans.kind[end] == kText;
      num_tokens += spans.length[end];
      if (is_constant) num_constant += spans.length[end];
    }
    f(first, end, start, num_constant, num_tokens);
    start += num_tokens;
    first = end;
  }
}

}  // namespace

LayoutCounts count_tokens(const Spans& spans, bool frozen_text, const Cache& cache) {
  LayoutCounts counts{};
  for (int64_t s = 0; s < spans.num_spans; ++s) {
    counts.num_tokens += spans.length[s];
    if (spans.kind[s] != kImage) {
      counts.num_text += spans.length[s];
    } else if (spans.length[s] > 1) {
      const int64_t num_rows = spans.length[s] - 1;
      ++counts.num_triangles;
      counts.num_triangle_rows += num_rows;
      counts.longest_triangle = std::max(counts.longest_triangle, num_rows);
    }
  }
  for_each_document(spans, frozen_text && cache.length == nullptr,
                    [&](int64_t, int64_t, int64_t, int64_t num_constant, int64_t num_tokens) {
    ++counts.num_documents;
    counts.num_constant += num_constant;
    counts.longest_active = std::max(counts.longest_active, num_tokens - num_constant);
  });
  return counts;
}

void fill_layout(const Spans& spans, bool frozen_text, const Cache& cache, const LayoutCounts& counts,
                 const LayoutVectors& out) {
  const bool has_cache = cache.length != nullptr;
  const auto num_constant = static_cast<int32_t>(counts.num_constant);
  // Running tower index of each row class, and rank of the next active row.
  int32_t next_constant = 0, next_live = num_constant, next_image = static_cast<int32_t>(counts.num_text), rank = 0;
  int32_t triangle = 0, triangle_row = 0;

  for_each_document(spans, frozen_text && !has_cache,
                    [&](int64_t first, int64_t end, int64_t start64, int64_t constant_here, int64_t num_tokens) {
    const auto start = static_cast<int32_t>(start64);
    const auto document_end = static_cast<int32_t>(start64 + num_tokens);
    const int32_t first_active = start + static_cast<int32_t>(constant_here);
    const int32_t rank_end = rank + (document_end - first_active);
    const int32_t document = spans.document[first];
    const int32_t cached = has_cache ? cache.length[document] : 0;
    const int32_t first_key = has_cache ? cache.start[document] : start;
    const int32_t key_shift = first_key + cached - start;  // from sequence index to row of the key buffer

    out.document_start[document] = start;
    out.document_key_start[document] = first_key;
    out.document_num_keys[document] = cached + static_cast<int32_t>(num_tokens);
    out.active_document_start[document] = rank;

    int32_t span_start = start;
    for (int64_t s = first; s < end; ++s) {
      const int32_t span_end = span_start + spans.length[s];
      const bool is_image = spans.kind[s] == kImage;
      const int32_t span_rank = rank;
      int32_t& next = is_image ? next_image : span_start < first_active ? next_constant : next_live;
      for (int32_t i = span_start; i < span_end; ++i) {
        const int32_t row = next++;
        const int32_t end_key = (is_image ? span_end : i + 1) + key_shift;
        out.tower_to_sequence[row] = i;
        out.sequence_to_tower[i] = row;
        out.position[i] = i - start + cached;
        out.key_start[i] = first_key;
        out.key_end[i] = end_key;
        out.key_slot[i] = i + key_shift;
        if (!has_cache) {
          out.query_start[i] = is_image ? span_start : i;
          out.query_end[i] = document_end;
        }
        if (i < first_active) {
          out.query_row[row] = row;
          out.constant_key_start[row] = first_key;
          out.constant_key_end[row] = end_key;
          continue;
        }
        out.query_row[row] = num_constant + rank;
        out.active_key_start[rank] = first_key;
        out.active_key_end[rank] = end_key;
        out.active_key[rank] = i;
        out.active_row[rank] = row - num_constant;
        if (!has_cache) {
          out.active_query_start[rank] = is_image ? span_rank : rank;
          out.active_query_end[rank] = rank_end;
        }
        ++rank;
      }
      if (is_image && span_end - span_start > 1) {
        out.triangle_start[triangle++] = triangle_row;
        for (int32_t i = span_end - 2; i >= span_start; --i, ++triangle_row) {
          out.triangle_row[triangle_row] = i;
          out.active_triangle_row[triangle_row] = span_rank + (i - span_start);
        }
      }
      span_start = span_end;
    }
  });
  out.document_start[counts.num_documents] = static_cast<int32_t>(counts.num_tokens);
  out.document_key_start[counts.num_documents] =
      has_cache ? cache.num_rows : static_cast<int32_t>(counts.num_tokens);
  out.active_document_start[counts.num_documents] = rank;
  out.triangle_start[triangle] = triangle_row;
}

}  // namespace lmf
