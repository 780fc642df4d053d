// SwiGLU on the CPU: checks, results, threads. The arithmetic is in cpu/swiglu_kernel.cpp.

#include "swiglu.h"

#include "../common/allocate.h"
#include "../common/arguments.h"

namespace lmf {
namespace {

Tensors swiglu(const Tensors& gate_ups, int64_t num_constant, bool keep) {
  Tensors result, kept;
  for (const Tensor& tower : gate_ups) {
    const int64_t width = check_gate_up(tower, gate_ups[0]), num_rows = tower.size(0);
    const Tensor gate_up = as_contiguous(tower), y = allocate({num_rows, width}, tower.scalar_type());
    const bool is_kept = keep && result.empty();
    if (is_kept) {
      check_num_constant(num_constant, num_rows);
      kept.push_back(allocate({num_rows - num_constant, 2 * width}, tower.scalar_type()));
    }
    with_element_type(tower.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const T* in = data<T>(gate_up);
      T* out = data<T>(y);
      T* copy = is_kept ? data<T>(kept[0]) : nullptr;
      torch::stable::parallel_for(0, num_rows, grain_of(2 * width), [&](int64_t begin, int64_t end) {
        LMF_CALL_KERNEL(swiglu_rows, in + begin * 2 * width, out + begin * width, end - begin, width);
        if (is_kept) copy_rows_from(num_constant, begin, end, 2 * width, in, copy);
      });
    });
    result.push_back(y);
  }
  append(result, kept);
  return result;
}

Tensors swiglu_backward(const Tensors& dys, const Tensors& gate_ups, bool recompute) {
  STD_TORCH_CHECK(dys.size() == gate_ups.size(), "dy holds ", dys.size(), " tensors, expected ", gate_ups.size());
  Tensors result, recomputed;
  for (size_t i = 0; i < gate_ups.size(); ++i) {
    const int64_t width = check_gate_up(gate_ups[i], gate_ups[0]), num_rows = gate_ups[i].size(0);
    const ScalarType dtype = gate_ups[i].scalar_type();
    check_dtype(dys[i], dtype, gate_ups[0], "dy");
    check_shape(dys[i], {num_rows, width}, "dy");
    const Tensor dy = as_contiguous(dys[i]), gate_up = as_contiguous(gate_ups[i]);
    result.push_back(allocate({num_rows, 2 * width}, dtype));
    if (recompute) recomputed.push_back(allocate({num_rows, width}, dtype));
    with_element_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      const T* dy_rows = data<T>(dy);
      const T* in = data<T>(gate_up);
      T* out = data<T>(result.back());
      T* y = recompute ? data<T>(recomputed.back()) : nullptr;
      torch::stable::parallel_for(0, num_rows, grain_of(2 * width), [&](int64_t begin, int64_t end) {
        LMF_CALL_KERNEL(
            swiglu_backward_rows, dy_rows + begin * width, in + begin * 2 * width, out + begin * 2 * width,
            y ? y + begin * width : nullptr, end - begin, width);
      });
    });
  }
  append(result, recomputed);
  return result;
}

}  // namespace
}  // namespace lmf

STABLE_TORCH_LIBRARY_IMPL(lmfusion, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&lmf::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&lmf::swiglu_backward));
}
