// SwiGLU of contiguous rows on one thread, forward and backward; compiled once per instruction set.

#include "swiglu.h"

#include "../elementwise/swiglu.h"

namespace lmf {
namespace LMF_ISA {
namespace {

template <typename T>
void forward(const T* gate_up, T* y, int64_t num_rows, int64_t width) {
  for (int64_t i = 0; i < num_rows; ++i) {
    const T* __restrict gate = gate_up + i * 2 * width;
    const T* __restrict up = gate + width;
    T* __restrict out = y + i * width;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) out[j] = narrow<T>(swiglu_element(widen(gate[j]), widen(up[j])));
  }
}

template <typename T, bool kRecompute>
void backward(const T* dy, const T* gate_up, T* dgate_up, T* y, int64_t num_rows, int64_t width) {
  for (int64_t i = 0; i < num_rows; ++i) {
    const T* __restrict grad = dy + i * width;
    const T* __restrict gate = gate_up + i * 2 * width;
    const T* __restrict up = gate + width;
    T* __restrict dgate = dgate_up + i * 2 * width;
    T* __restrict dup = dgate + width;
    T* __restrict out = kRecompute ? y + i * width : nullptr;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const SwigluGrad result = swiglu_backward_element(widen(grad[j]), widen(gate[j]), widen(up[j]));
      dgate[j] = narrow<T>(result.gate);
      dup[j] = narrow<T>(result.up);
      if constexpr (kRecompute) out[j] = narrow<T>(result.y);
    }
  }
}

template <typename T>
void choose_recompute(const T* dy, const T* gate_up, T* dgate_up, T* y, int64_t num_rows, int64_t width) {
  y ? backward<T, true>(dy, gate_up, dgate_up, y, num_rows, width)
    : backward<T, false>(dy, gate_up, dgate_up, y, num_rows, width);
}

}  // namespace

void swiglu_rows(const float* gate_up, float* y, int64_t num_rows, int64_t width) {
  forward(gate_up, y, num_rows, width);
}

void swiglu_rows(const bfloat16* gate_up, bfloat16* y, int64_t num_rows, int64_t width) {
  forward(gate_up, y, num_rows, width);
}

void swiglu_backward_rows(
    const float* dy, const float* gate_up, float* dgate_up, float* y, int64_t num_rows, int64_t width) {
  choose_recompute(dy, gate_up, dgate_up, y, num_rows, width);
}

void swiglu_backward_rows(
    const bfloat16* dy, const bfloat16* gate_up, bfloat16* dgate_up, bfloat16* y, int64_t num_rows, int64_t width) {
  choose_recompute(dy, gate_up, dgate_up, y, num_rows, width);
}

}  // namespace LMF_ISA
}  // namespace lmf
