// Cuts the work of an op on the CPU into pieces for threads.

#pragma once

#include <cstring>

#include "../common/checks.h"

namespace lmf {

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

// Copies those of the rows [begin, end) of `in` that are at or after `first` to row i - first of `out`.
template <typename T>
void copy_rows_from(int64_t first, int64_t begin, int64_t end, int64_t width, const T* in, T* out) {
  begin = std::max(begin, first);
  if (begin < end) std::memcpy(out + (begin - first) * width, in + begin * width, (end - begin) * width * sizeof(T));
}

// Rows cut into chunks for sums over rows: each chunk gives one float32 partial sum, and these are added in order. The
// cut depends only on the number of rows, so results do not depend on the number of threads.
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
