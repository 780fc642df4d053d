// The Python module lmfusion_kernels._layout_native: numpy in, numpy out, without torch, so that data workers load it
// fast. lmfusion_kernels/layout/build.py and packing.py have the same functions in numpy, and their documentation.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <utility>
#include <vector>

#include "../cpu/isa.h"
#include "layout.h"
#include "packing.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

std::pair<py::dict, py::dict> build_layout(
    const Array<uint8_t>& kinds, const Array<int32_t>& lengths, const Array<int32_t>& documents, bool frozen_text,
    const std::optional<Array<int32_t>>& cached_lengths, const std::optional<Array<int32_t>>& cache_starts,
    int32_t cache_slots, const std::optional<Array<int32_t>>& segments, const std::optional<Array<uint8_t>>& modes) {
  if (kinds.size() != lengths.size() || kinds.size() != documents.size()) {
    throw py::value_error("kinds, lengths and documents must have one entry per span");
  }
  if (segments.has_value() != modes.has_value() ||
      (segments && (segments->size() != kinds.size() || modes->size() != kinds.size()))) {
    throw py::value_error("segments and modes must have one entry per span, or both be None");
  }
  const lmf::Spans spans{
      kinds.data(),
      lengths.data(),
      documents.data(),
      kinds.size(),
      segments ? segments->data() : nullptr,
      modes ? modes->data() : nullptr};
  if (cached_lengths.has_value() != cache_starts.has_value() ||
      (cached_lengths && cached_lengths->size() != cache_starts->size())) {
    throw py::value_error("cached_lengths and cache_starts must have one entry per document, or both be None");
  }
  const lmf::Cache cache{
      cached_lengths ? cached_lengths->data() : nullptr, cache_starts ? cache_starts->data() : nullptr, cache_slots};
  const lmf::LayoutCounts counts = lmf::count_tokens(spans, frozen_text, cache);

  py::dict vectors;
  const auto vector = [&](const char* name, int64_t size) {
    py::array_t<int32_t> array(size);
    vectors[name] = array;
    return array.mutable_data();
  };
  const int64_t num_tokens = counts.num_tokens, num_constant = counts.num_constant;
  const int64_t num_active = num_tokens - num_constant;
  const bool has_cache = cache.length != nullptr;
  lmf::LayoutVectors out;
  out.tower_to_sequence = vector("tower_to_sequence", num_tokens);
  out.sequence_to_tower = vector("sequence_to_tower", num_tokens);
  out.position = vector("position", num_tokens);
  out.key_start = vector("key_start", num_tokens);
  out.key_end = vector("key_end", num_tokens);
  out.query_start = vector("query_start", has_cache ? 0 : num_tokens);
  out.query_end = vector("query_end", has_cache ? 0 : num_tokens);
  out.key_slot = vector("key_slot", num_tokens);
  out.query_row = vector("query_row", num_tokens);
  out.constant_key_start = vector("constant_key_start", num_constant);
  out.constant_key_end = vector("constant_key_end", num_constant);
  out.active_key_start = vector("active_key_start", num_active);
  out.active_key_end = vector("active_key_end", num_active);
  out.active_key = vector("active_key", num_active);
  out.active_query_start = vector("active_query_start", has_cache ? 0 : num_active);
  out.active_query_end = vector("active_query_end", has_cache ? 0 : num_active);
  out.active_row = vector("active_row", num_active);
  out.document_start = vector("document_start", counts.num_documents + 1);
  out.document_key_start = vector("document_key_start", counts.num_documents + 1);
  out.document_num_keys = vector("document_num_keys", counts.num_documents);
  out.active_document_start = vector("active_document_start", counts.num_documents + 1);
  out.triangle_start = vector("triangle_start", counts.num_triangles + 1);
  out.triangle_row = vector("triangle_row", counts.num_triangle_rows);
  out.active_triangle_row = vector("active_triangle_row", counts.num_triangle_rows);
  const bool has_hidden = counts.num_hidden_segments > 0;
  const int64_t num_hidden_entries = has_hidden ? num_tokens : 0;
  const int64_t num_parts = has_hidden ? counts.num_documents + counts.num_hidden_segments : -1;
  out.visible_end = vector("visible_end", num_hidden_entries);
  out.constant_visible_end = vector("constant_visible_end", num_hidden_entries);
  out.active_visible_end = vector("active_visible_end", num_hidden_entries);
  out.run_end = vector("run_end", num_hidden_entries);
  out.part_start = vector("part_start", num_parts + 1);
  out.part_row = vector("part_row", num_hidden_entries);
  out.part_key_start = vector("part_key_start", num_parts + 1);
  out.part_key = vector("part_key", counts.num_part_keys);
  out.active_part_start = vector("active_part_start", num_parts + 1);
  out.active_part_row = vector("active_part_row", has_hidden ? num_active : 0);
  out.constant_part_row = vector("constant_part_row", has_hidden ? num_constant : 0);
  out.constant_part_num_keys = vector("constant_part_num_keys", has_hidden ? num_parts : 0);
  {
    py::gil_scoped_release release;
    lmf::fill_layout(spans, frozen_text, cache, counts, out);
  }
  py::dict numbers;
  numbers["num_tokens"] = num_tokens;
  numbers["num_text"] = counts.num_text;
  numbers["num_constant"] = num_constant;
  numbers["longest_active"] = counts.longest_active;
  numbers["longest_triangle"] = counts.longest_triangle;
  return {vectors, numbers};
}

py::list pack(const Array<int64_t>& lengths, int64_t capacity, int64_t window) {
  std::vector<std::vector<int64_t>> sequences;
  {
    py::gil_scoped_release release;
    sequences = lmf::pack(lengths.data(), lengths.size(), capacity, window);
  }
  py::list result;
  for (const auto& documents : sequences) {
    result.append(py::array_t<int64_t>(documents.size(), documents.data()));
  }
  return result;
}

const char* instruction_set() {
  switch (lmf::best_isa()) {
    case lmf::Isa::kAvx512: return "avx512";
    case lmf::Isa::kAvx2: return "avx2";
    case lmf::Isa::kBaseline: return "baseline";
  }
  return "baseline";
}

}  // namespace

PYBIND11_MODULE(_layout_native, m) {
  m.def(
      "build_layout", &build_layout, py::arg("kinds"), py::arg("lengths"), py::arg("documents"), py::arg("frozen_text"),
      py::arg("cached_lengths"), py::arg("cache_starts"), py::arg("cache_slots"), py::arg("segments") = py::none(),
      py::arg("modes") = py::none());
  m.def("pack", &pack);
  m.def("instruction_set", &instruction_set);
}
