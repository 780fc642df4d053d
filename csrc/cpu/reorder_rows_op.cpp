// Rows of any dtype in another order, on the CPU.

#include "../common/allocate.h"
#include "../common/arguments.h"

namespace lmf {
namespace {

Tensor reorder_rows(const Tensor& x_in, const Tensor& index_in, const Tensor& inverse) {
  check_reorder(x_in, inverse);
  const int64_t num_rows = x_in.size(0);
  const Tensor index = check_index(index_in, num_rows, num_rows, x_in, "index");
  const Tensor x = as_contiguous(x_in);
  const Tensor y = allocate(std::vector<int64_t>(x.sizes().begin(), x.sizes().end()), x.scalar_type());
  const int64_t row_bytes = num_rows ? x.numel() / num_rows * static_cast<int64_t>(x.element_size()) : 0;
  const char* in = data<char>(x);
  char* out = data<char>(y);
  const int32_t* from = data<int32_t>(index);
  torch::stable::parallel_for(0, num_rows, grain_of(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(out + i * row_bytes, in + from[i] * row_bytes, row_bytes);
  });
  return y;
}

}  // namespace
}  // namespace lmf

STABLE_TORCH_LIBRARY_IMPL(lmfusion, CPU, m) { m.impl("reorder_rows", TORCH_BOX(&lmf::reorder_rows)); }
