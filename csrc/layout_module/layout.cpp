// Builds the index vectors of a layout; see layout.h.

#include "layout.h"

#include <algorithm>

namespace lmf {
namespace {

// Calls f(first_span, end_span, start, num_constant, num_tokens) for each document. Its constant tokens are a prefix:
// the text before its first image, marker or full segment. A layout with a cache has no backward, so none are constant.
template <class F>
void for_each_document(const Spans& spans, bool has_constant, F f) {
  int64_t start = 0;
  for (int64_t first = 0; first < spans.num_spans;) {
    int64_t end = first, num_tokens = 0, num_constant = 0;
    bool is_constant = has_constant;
    for (; end < spans.num_spans && spans.document[end] == spans.document[first]; ++end) {
      is_constant = is_constant && spans.kind[end] == kText && !spans.is_full(end);
      num_tokens += spans.length[end];
      if (is_constant) num_constant += spans.length[end];
    }
    f(first, end, start, num_constant, num_tokens);
    start += num_tokens;
    first = end;
  }
}

// Calls f(first_span, end_span, start, num_tokens) for each segment of the spans [first, end), which begin at `start`.
template <class F>
void for_each_segment(const Spans& spans, int64_t first, int64_t end, int64_t start, F f) {
  while (first < end) {
    int64_t next = first + 1, num_tokens = spans.length[first];
    for (; next < end && spans.joins_previous(next); ++next) num_tokens += spans.length[next];
    f(first, next, start, num_tokens);
    start += num_tokens;
    first = next;
  }
}

// Fills the parts of one document: its visible tokens, then its hidden segments with the visible tokens before them as
// keys.
void fill_parts(
    const Spans& spans, int64_t first, int64_t end, int32_t start, int32_t first_active, int32_t rank,
    int32_t num_constant_before, const LayoutVectors& out, int32_t& part, int32_t& row, int32_t& key) {
  int32_t active = rank, constant = num_constant_before;  // next entries of active_part_row and constant_part_row
  const auto begin_part = [&](int32_t num_constant_keys) {
    out.part_start[part] = row;
    out.part_key_start[part] = key;
    out.active_part_start[part] = active;
    out.constant_part_num_keys[part++] = num_constant_keys;
  };
  const auto add_query = [&](int32_t i) {
    out.part_row[row++] = i;
    if (i < first_active) {
      out.constant_part_row[constant++] = num_constant_before + (i - start);
    } else {
      out.active_part_row[active++] = rank + (i - first_active);
    }
  };
  begin_part(0);
  const int32_t visible_part = part - 1, first_key = key;
  for_each_segment(spans, first, end, start, [&](int64_t s, int64_t, int64_t segment_start, int64_t num_tokens) {
    if (spans.is_hidden(s)) return;
    for (auto i = static_cast<int32_t>(segment_start); i < segment_start + num_tokens; ++i) {
      out.part_key[key++] = i;
      out.constant_part_num_keys[visible_part] += i < first_active;
      add_query(i);
    }
  });
  int32_t num_visible = 0;
  for_each_segment(spans, first, end, start, [&](int64_t s, int64_t, int64_t segment_start, int64_t num_tokens) {
    if (!spans.is_hidden(s)) {
      num_visible += static_cast<int32_t>(num_tokens);
      return;
    }
    const auto begin = static_cast<int32_t>(segment_start), size = static_cast<int32_t>(num_tokens);
    begin_part(begin < first_active ? num_visible + size : 0);
    key = static_cast<int32_t>(std::copy_n(out.part_key + first_key, num_visible, out.part_key + key) - out.part_key);
    for (int32_t i = begin; i < begin + size; ++i) {
      out.part_key[key++] = i;
      add_query(i);
    }
  });
}

}  // namespace

LayoutCounts count_tokens(const Spans& spans, bool frozen_text, const Cache& cache) {
  LayoutCounts counts{};
  for (int64_t s = 0; s < spans.num_spans; ++s) {
    counts.num_tokens += spans.length[s];
    if (spans.kind[s] != kImage) counts.num_text += spans.length[s];
  }
  for_each_segment(spans, 0, spans.num_spans, 0, [&](int64_t s, int64_t, int64_t, int64_t num_tokens) {
    counts.num_hidden_segments += spans.is_hidden(s);
    if (!spans.is_full(s) || num_tokens < 2) return;
    ++counts.num_triangles;
    counts.num_triangle_rows += num_tokens - 1;
    counts.longest_triangle = std::max(counts.longest_triangle, num_tokens - 1);
  });
  for_each_document(
      spans, frozen_text && cache.length == nullptr,
      [&](int64_t first, int64_t end, int64_t start, int64_t num_constant, int64_t num_tokens) {
    if (counts.num_hidden_segments > 0) {
      int64_t num_visible = 0;
      for_each_segment(spans, first, end, start, [&](int64_t s, int64_t, int64_t, int64_t size) {
        counts.num_part_keys += size;  // as keys of the visible tokens, or of its own hidden ones
        if (spans.is_hidden(s)) counts.num_part_keys += num_visible;
        if (!spans.is_hidden(s)) num_visible += size;
      });
    }
    ++counts.num_documents;
    counts.num_constant += num_constant;
    counts.longest_active = std::max(counts.longest_active, num_tokens - num_constant);
  });
  return counts;
}

void fill_layout(
    const Spans& spans, bool frozen_text, const Cache& cache, const LayoutCounts& counts, const LayoutVectors& out) {
  const bool has_cache = cache.length != nullptr;
  const auto num_constant = static_cast<int32_t>(counts.num_constant);
  // Running tower index of each class of tokens, and rank of the next active token.
  int32_t next_constant = 0, next_live = num_constant, next_image = static_cast<int32_t>(counts.num_text), rank = 0;
  int32_t triangle = 0, triangle_row = 0;
  const bool has_hidden = counts.num_hidden_segments > 0;
  int32_t part = 0, part_row = 0, part_key = 0;

  for_each_document(
      spans, frozen_text && !has_cache,
      [&](int64_t first, int64_t end, int64_t start64, int64_t constant_here, int64_t num_tokens) {
    const auto start = static_cast<int32_t>(start64);
    const auto document_end = static_cast<int32_t>(start64 + num_tokens);
    const int32_t first_active = start + static_cast<int32_t>(constant_here);
    const int32_t rank_end = rank + (document_end - first_active);
    const int32_t document = spans.document[first];
    const int32_t cached = has_cache ? cache.length[document] : 0;
    const int32_t first_key = has_cache ? cache.start[document] : start;
    const int32_t key_shift = first_key + cached - start;  // from sequence index to key slot

    out.document_start[document] = start;
    out.document_key_start[document] = first_key;
    out.document_num_keys[document] = cached + static_cast<int32_t>(num_tokens);
    out.active_document_start[document] = rank;

    if (has_hidden)
      fill_parts(spans, first, end, start, first_active, rank, next_constant, out, part, part_row, part_key);
    int32_t run_start = start;  // the first token after the last hidden segment
    for_each_segment(
        spans, first, end, start, [&](int64_t first_span, int64_t, int64_t start_of_segment, int64_t size) {
      const auto segment_start = static_cast<int32_t>(start_of_segment);
      const auto segment_end = static_cast<int32_t>(start_of_segment + size);
      const bool is_full = spans.is_full(first_span), is_hidden = spans.is_hidden(first_span);
      const int32_t segment_rank = rank;
      const int32_t visible_end = is_hidden ? segment_end : document_end;
      const int32_t visible_rank = rank_end - (document_end - std::max(visible_end, first_active));
      int64_t s = first_span;
      int32_t span_end = segment_start + spans.length[s];
      for (int32_t i = segment_start; i < segment_end; ++i) {
        if (i == span_end) span_end += spans.length[++s];
        int32_t& next = spans.kind[s] == kImage ? next_image : i < first_active ? next_constant : next_live;
        const int32_t row = next++;
        const int32_t end_key = (is_full ? segment_end : i + 1) + key_shift;
        out.tower_to_sequence[row] = i;
        out.sequence_to_tower[i] = row;
        out.position[i] = i - start + cached;
        out.key_start[i] = first_key;
        out.key_end[i] = end_key;
        out.key_slot[i] = i + key_shift;
        if (!has_cache) {
          out.query_start[i] = is_full ? segment_start : i;
          out.query_end[i] = visible_end;
        }
        if (has_hidden) {
          out.visible_end[i] = visible_end;
          out.active_visible_end[i] = visible_rank;
          out.constant_visible_end[i] = visible_end - visible_rank;
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
          out.active_query_start[rank] = is_full ? segment_rank : rank;
          out.active_query_end[rank] = visible_rank;
        }
        ++rank;
      }
      if (is_full && size > 1) {
        out.triangle_start[triangle++] = triangle_row;
        for (int32_t i = segment_end - 2; i >= segment_start; --i, ++triangle_row) {
          out.triangle_row[triangle_row] = i;
          out.active_triangle_row[triangle_row] = segment_rank + (i - segment_start);
        }
      }
      if (is_hidden) {
        std::fill(out.run_end + run_start, out.run_end + segment_start, segment_start);
        std::fill(out.run_end + segment_start, out.run_end + segment_end, segment_end);
        run_start = segment_end;
      }
    });
    if (has_hidden) std::fill(out.run_end + run_start, out.run_end + document_end, document_end);
  });
  out.document_start[counts.num_documents] = static_cast<int32_t>(counts.num_tokens);
  out.document_key_start[counts.num_documents] = has_cache ? cache.num_slots : static_cast<int32_t>(counts.num_tokens);
  out.active_document_start[counts.num_documents] = rank;
  out.triangle_start[triangle] = triangle_row;
  if (has_hidden) {
    out.part_start[part] = part_row;
    out.part_key_start[part] = part_key;
    out.active_part_start[part] = rank;
  }
}

}  // namespace lmf
