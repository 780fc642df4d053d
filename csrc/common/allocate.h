// Allocates the results of ops on the device of their arguments.

#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "checks.h"

namespace lmf {

// Asks for huge pages under a fresh allocation. Row ops move each byte about once, so the page faults of first touch
// (one for every 4 KiB otherwise) would cost several times as much as the arithmetic.
inline void advise_huge_pages(void* data, int64_t num_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + num_bytes) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only advice: it may fail
#else
  (void)data;
  (void)num_bytes;
#endif
}

// A contiguous tensor on the device of `beside`.
inline Tensor allocate(const std::vector<int64_t>& shape, ScalarType dtype, const Tensor& beside) {
  if (is_on_gpu(beside)) return torch::stable::empty(shape, dtype, std::nullopt, beside.device());
  Tensor t = torch::stable::empty(shape, dtype);
  advise_huge_pages(t.mutable_data_ptr(), t.numel() * static_cast<int64_t>(t.element_size()));
  return t;
}

inline Tensors allocate_like(const Tensors& like) {
  Tensors result;
  for (const Tensor& t : like) result.push_back(allocate({t.size(0), t.size(1)}, t.scalar_type(), t));
  return result;
}

inline void append(Tensors& to, const Tensors& from) { to.insert(to.end(), from.begin(), from.end()); }

}  // namespace lmf
