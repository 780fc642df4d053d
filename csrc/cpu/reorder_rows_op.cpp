// Moves rows of any dtype into another order on the CPU.

#include "../common/op_arguments.h"
#include "threads.h"

namespace lmf {
namespace {

Tensor reorder_rows(const Tensor& x, const Tensor& index, const Tensor& inverse) {
  const ReorderRowsTensors t(x, index, inverse);
  const char* in = data<char>(t.x);
  char* out = data<char>(t.y);
  const int32_t* from = data<int32_t>(t.index);
  torch::stable::parallel_for(0, t.num_rows, grain_of(t.row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(out + i * t.row_bytes, in + from[i] * t.row_bytes, t.row_bytes);
  });
  return t.y;
}

}  // namespace
}  // namespace lmf

STABLE_TORCH_LIBRARY_IMPL(lmfusion, CPU, m) { m.impl("reorder_rows", TORCH_BOX(&lmf::reorder_rows)); }
