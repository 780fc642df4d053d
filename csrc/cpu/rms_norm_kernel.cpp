// RMSNorm of contiguous rows on one thread, forward and backward; compiled once per instruction set.

#include "rms_norm.h"

#include "../elementwise/rms_norm.h"

namespace lmf {
namespace LMF_ISA {
namespace {

template <typename T, bool kResidual>
void forward(const RmsNormRows<T>& rows) {
  const int64_t width = rows.width;
  const T* __restrict weight = rows.weight;
  for (int64_t i = 0; i < rows.num_rows; ++i) {
    const T* __restrict x = rows.x + i * width;
    const T* __restrict residual = kResidual ? rows.residual + i * width : nullptr;
    T* __restrict sum = kResidual ? rows.sum + i * width : nullptr;
    T* __restrict y = rows.y + i * width;
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < width; ++j) {
      float value = widen(x[j]);
      if constexpr (kResidual) {
        sum[j] = narrow<T>(value + widen(residual[j]));
        value = widen(sum[j]);
      }
      squares += value * value;
    }
    const float rstd = norm_rstd(squares, width, rows.eps);
    const T* __restrict normed = kResidual ? sum : x;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) y[j] = narrow<T>(norm_element(widen(normed[j]), widen(weight[j]), rstd));
    rows.rstd[i] = rstd;
  }
}

template <typename T, bool kResidual, bool kWeightGrad, bool kRecompute>
void backward(const RmsNormBackwardRows<T>& rows) {
  const int64_t width = rows.width;
  const T* __restrict weight = rows.weight;
  float* __restrict dweight = rows.dweight;
  for (int64_t i = 0; i < rows.num_rows; ++i) {
    const T* __restrict dy = rows.dy + i * width;
    const T* __restrict x = rows.x + i * width;
    const T* __restrict dresidual = kResidual ? rows.dresidual + i * width : nullptr;
    T* __restrict dx = rows.dx + i * width;
    T* __restrict y = kRecompute ? rows.y + i * width : nullptr;
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < width; ++j) dot += widen(weight[j]) * widen(dy[j]) * widen(x[j]);
    const float rstd = rows.rstd[i];
    const float correction = norm_correction(dot, width, rstd);
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const float dy_j = widen(dy[j]), x_j = widen(x[j]), weight_j = widen(weight[j]);
      float dx_j = norm_backward_element(dy_j, x_j, weight_j, rstd, correction);
      if constexpr (kResidual) dx_j += widen(dresidual[j]);
      dx[j] = narrow<T>(dx_j);
      if constexpr (kWeightGrad) dweight[j] += norm_weight_grad(dy_j, x_j, rstd);
      if constexpr (kRecompute) y[j] = narrow<T>(norm_element(x_j, weight_j, rstd));
    }
  }
}

template <typename T, bool kResidual, bool kWeightGrad>
void choose_recompute(const RmsNormBackwardRows<T>& rows) {
  rows.y ? backward<T, kResidual, kWeightGrad, true>(rows) : backward<T, kResidual, kWeightGrad, false>(rows);
}

template <typename T, bool kResidual>
void choose_weight_grad(const RmsNormBackwardRows<T>& rows) {
  rows.dweight ? choose_recompute<T, kResidual, true>(rows) : choose_recompute<T, kResidual, false>(rows);
}

template <typename T>
void reduce(float* partials, int64_t num_partials, int64_t stride, int64_t width, T* out) {
  for (int64_t i = 1; i < num_partials; ++i) {
    const float* __restrict partial = partials + i * stride;
    float* __restrict total = partials;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) total[j] += partial[j];
  }
  for (int64_t j = 0; j < width; ++j) out[j] = narrow<T>(num_partials > 0 ? partials[j] : 0.0f);
}

}  // namespace

void rms_norm_rows(const RmsNormRows<float>& rows) {
  rows.residual ? forward<float, true>(rows) : forward<float, false>(rows);
}

void rms_norm_rows(const RmsNormRows<bfloat16>& rows) {
  rows.residual ? forward<bfloat16, true>(rows) : forward<bfloat16, false>(rows);
}

void rms_norm_backward_rows(const RmsNormBackwardRows<float>& rows) {
  rows.dresidual ? choose_weight_grad<float, true>(rows) : choose_weight_grad<float, false>(rows);
}

void rms_norm_backward_rows(const RmsNormBackwardRows<bfloat16>& rows) {
  rows.dresidual ? choose_weight_grad<bfloat16, true>(rows) : choose_weight_grad<bfloat16, false>(rows);
}

void sum_partials(float* partials, int64_t num_partials, int64_t stride, int64_t width, float* out) {
  reduce(partials, num_partials, stride, width, out);
}

void sum_partials(float* partials, int64_t num_partials, int64_t stride, int64_t width, bfloat16* out) {
  reduce(partials, num_partials, stride, width, out);
}

}  // namespace LMF_ISA
}  // namespace lmf
