// SwiGLU on the CPU: the ops and their threads. The arithmetic is in swiglu_kernel.cpp.

#include "swiglu.h"

#include "../common/op_arguments.h"
#include "threads.h"

namespace lmf {
namespace {

Tensors swiglu(const Tensors& gate_ups, int64_t num_constant, bool keep) {
  const SwigluTensors t(gate_ups, num_constant, keep);
  for (size_t i = 0; i < t.gate_up.size(); ++i) {
    const int64_t num_rows = t.y[i].size(0), width = t.y[i].size(1);
    with_element_type(t.y[i].scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const T* in = data<T>(t.gate_up[i]);
      T* out = data<T>(t.y[i]);
      T* copy = keep && i == 0 ? data<T>(t.kept[0]) : nullptr;
      torch::stable::parallel_for(0, num_rows, grain_of(2 * width), [&](int64_t begin, int64_t end) {
        LMF_CALL_KERNEL(swiglu_rows, in + begin * 2 * width, out + begin * width, end - begin, width);
        if (copy != nullptr) copy_rows_from(num_constant, begin, end, 2 * width, in, copy);
      });
    });
  }
  return t.results();
}

Tensors swiglu_backward(const Tensors& dys, const Tensors& gate_ups, bool recompute) {
  const SwigluBackwardTensors t(dys, gate_ups, recompute);
  for (size_t i = 0; i < t.gate_up.size(); ++i) {
    const int64_t num_rows = t.dy[i].size(0), width = t.dy[i].size(1);
    with_element_type(t.dy[i].scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      const T* dy = data<T>(t.dy[i]);
      const T* in = data<T>(t.gate_up[i]);
      T* out = data<T>(t.dgate_up[i]);
      T* y = recompute ? data<T>(t.y[i]) : nullptr;
      torch::stable::parallel_for(0, num_rows, grain_of(2 * width), [&](int64_t begin, int64_t end) {
        LMF_CALL_KERNEL(
            swiglu_backward_rows, dy + begin * width, in + begin * 2 * width, out + begin * 2 * width,
            y ? y + begin * width : nullptr, end - begin, width);
      });
    });
  }
  return t.results();
}

}  // namespace
}  // namespace lmf

STABLE_TORCH_LIBRARY_IMPL(lmfusion, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&lmf::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&lmf::swiglu_backward));
}
