// Where do results come from, and how is work cut into pieces for threads? For csrc/<op>.cpp.

#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstring>

#include "checks.h"

namespace lmf {

// Asks for huge pages under a fresh allocation. Row ops move each byte about once, so the page faults of first touch
// (one for every 4 KiB otherwise) would cost several times as much as the arithmetic.
inline void advise_huge_pages(void* data, int64_t num_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + num_bytes) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failure is no error
#else
  (void)data;
  (void)num_bytes;
#endif
}

inline Tensor allocate(const std::vector<int64_t>& shape, ScalarType dtype) {
  Tensor t = torch::stable::empty(shape, dtype);
  advise_huge_pages(t.mutable_data_ptr(), t.numel() * static_cast<int64_t>(t.element_size()));
  return t;
}

inline Tensors allocate_like(const Tensors& like) {
  Tensors result;
  for (const Tensor& t : like) result.push_back(allocate({t.size(0), t.size(1)}, t.scalar_type()));
  return result;
}

inline void append(Tensors& to, const Tensors& from) { to.insert(to.end(), from.begin(), from.end()); }

// Copies those of the rows [begin, end) of `in` that are at or after `first` to row i - first of `out`.
template <typename T>
void copy_rows_from(int64_t first, int64_t begin, int64_t end, int64_t width, const T* in, T* out) {
  begin = std::max(begin, first);
  if (begin < end) std::memcpy(out + (begin - first) * width, in + begin * width, (end - begin) * width * sizeof(T));
}

// Rows per thread below which a thread is not worth waking.
inline int64_t grain_of(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

// Calls f(tower, begin, end) for all items of both towers, in parallel.
template <typename F>
void parallel_towers(const int64_t (&num_items)[2], int64_t grain, const F& f) {
  const int64_t num_text = num_items[0];
  torch::stable::parallel_for(0, num_text + num_items[1], grain, [&](int64_t begin, int64_t end) {
    if (begin < num_text) f(0, begin, std::min(end, num_text));
    if (end > num_text) f(1, std::max(begin, num_text) - num_text, end - num_text);
  });
}

// Rows cut into chunks for sums over rows: one float32 partial sum a chunk, added up in order. The cut depends on the
// number of rows alone, so results do not depend on the number of threads.
struct Chunks {
  static constexpr int64_t kMaxChunks = 128, kMinRows = 32;
  int64_t num_rows;
  int64_t rows_per_chunk;
  int64_t count;

  explicit Chunks(int64_t rows)
      : num_rows(rows),
        rows_per_chunk(std::max(kMinRows, (rows + kMaxChunks - 1) / kMaxChunks)),
        count((rows + rows_per_chunk - 1) / rows_per_chunk) {}
  int64_t begin(int64_t chunk) const { return chunk * rows_per_chunk; }
  int64_t end(int64_t chunk) const { return std::min(num_rows, (chunk + 1) * rows_per_chunk); }
};

}  // namespace lmf
