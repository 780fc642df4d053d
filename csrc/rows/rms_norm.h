// What does RMSNorm compute for one element of a row? Shared by host and device, by the towers' norms and by QK norm.
//
//   y = x * rstd * weight,   rstd = 1 / sqrt(sum(x^2) / width + eps)
//   dx = rstd * (weight * dy - x * correction),   correction = rstd^2 * sum(weight * dy * x) / width
//   dweight = sum over rows of dy * x * rstd

#pragma once

#include <math.h>

#include "scalar.h"

namespace lmf {
namespace LMF_ISA {

LMF_HD float norm_rstd(float sum_of_squares, int64_t width, float eps) {
  return 1.0f / sqrtf(sum_of_squares / static_cast<float>(width) + eps);
}

LMF_HD float norm_element(float x, float weight, float rstd) { return x * rstd * weight; }

LMF_HD float norm_correction(float sum_of_weight_dy_x, int64_t width, float rstd) {
  return sum_of_weight_dy_x / static_cast<float>(width) * rstd * rstd;
}

LMF_HD float norm_backward_element(float dy, float x, float weight, float rstd, float correction) {
  return rstd * (weight * dy - x * correction);
}

LMF_HD float norm_weight_grad(float dy, float x, float rstd) { return dy * (x * rstd); }

}  // namespace LMF_ISA
}  // namespace lmf
