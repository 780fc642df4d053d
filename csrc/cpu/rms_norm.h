// The CPU kernels of RMSNorm. Rows are contiguous, and each call works on one thread.

#pragma once

#include <cstdint>

#include "../elementwise/scalar.h"
#include "isa.h"

namespace lmf {

template <typename T>
struct RmsNormRows {
  const T* x;
  const T* residual;  // null: none
  const T* weight;
  T* y;
  T* sum;  // x + residual; null without a residual
  float* rstd;
  int64_t num_rows, width;
  float eps;
};

template <typename T>
struct RmsNormBackwardRows {
  const T* dy;
  const T* x;
  const float* rstd;
  const T* weight;
  const T* dresidual;  // added to dx; null: none
  T* dx;
  float* dweight;  // [width], increased by the sum over these rows; null: not wanted
  T* y;            // the forward's result; null: not wanted
  int64_t num_rows, width;
};

}  // namespace lmf

LMF_DECLARE_KERNEL(void, rms_norm_rows, (const RmsNormRows<float>& rows))
LMF_DECLARE_KERNEL(void, rms_norm_rows, (const RmsNormRows<bfloat16>& rows))
LMF_DECLARE_KERNEL(void, rms_norm_backward_rows, (const RmsNormBackwardRows<float>& rows))
LMF_DECLARE_KERNEL(void, rms_norm_backward_rows, (const RmsNormBackwardRows<bfloat16>& rows))
// out[j] = sum over the num_partials rows (stride apart) of partials[j], for j < width. Overwrites partials.
LMF_DECLARE_KERNEL(
    void, sum_partials, (float* partials, int64_t num_partials, int64_t stride, int64_t width, float* out))
LMF_DECLARE_KERNEL(
    void, sum_partials, (float* partials, int64_t num_partials, int64_t stride, int64_t width, bfloat16* out))
