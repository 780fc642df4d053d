// RMSNorm of one element of a row. Shared by host and device, by the towers' norms and by QK norm.
//
//   y = x * rstd * weight,   rstd = 1 / sqrt(sum(x^2) / width + eps)
//   dx = rstd * (weight * dy - x * correction),   correction = rstd^2 * sum(weight * dy * x) / width
//   dweight = sum over rows of dy * x * rstd

#pragma once

#include <math.h>

#include "scalar.h"

namespace lmf {
namespace LMF_ISA {

// On the GPU exact quotients and roots are subroutines; these approximations are within 2 ulp each.
LMF_HD float mean(float sum, int64_t width) {
#if defined(__CUDA_ARCH__)
  return __fdividef(sum, static_cast<float>(width));
#else
  return sum / static_cast<float>(width);
#endif
}

LMF_HD float norm_rstd(float sum_of_squares, int64_t width, float eps) {
#if defined(__CUDA_ARCH__)
  return rsqrtf(mean(sum_of_squares, width) + eps);
#else
  return 1.0f / sqrtf(mean(sum_of_squares, width) + eps);
#endif
}

LMF_HD float norm_element(float x, float weight, float rstd) { return x * rstd * weight; }

LMF_HD float norm_correction(float sum_of_weight_dy_x, int64_t width, float rstd) {
  return mean(sum_of_weight_dy_x, width) * rstd * rstd;
}

LMF_HD float norm_backward_element(float dy, float x, float weight, float rstd, float correction) {
  return rstd * (weight * dy - x * correction);
}

LMF_HD float norm_weight_grad(float dy, float x, float rstd) { return dy * (x * rstd); }

}  // namespace LMF_ISA
}  // namespace lmf
