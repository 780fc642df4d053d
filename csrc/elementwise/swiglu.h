// SwiGLU of one element. Shared by host and device.
//
//   y = gate * sigmoid(gate) * up

#pragma once

#include <math.h>

#include "scalar.h"

namespace lmf {
namespace LMF_ISA {

// exp(x) to about 1 ulp for x >= -87, 0 below, and infinity if exp(x) exceeds float32. NaN may give any number: the
// callers multiply what they compute from it by x. Without branches and calls, so that loops over it vectorise:
// x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial in r (Cephes' expf), and n added to the exponent. For n = 128, r is
// at most 0, so the polynomial is at most 1, and the sum of the exponents at most that of infinity.
LMF_HD float fast_exp(float x) {
  const float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  const float shifted = x * 1.44269504088896341f + round_magic;
  const float n = shifted - round_magic;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  uint32_t shifted_bits, bits;
  memcpy(&shifted_bits, &shifted, sizeof(shifted_bits));
  memcpy(&bits, &p, sizeof(bits));
  bits += shifted_bits << 23;
  memcpy(&p, &bits, sizeof(p));
  p = x < -87.0f ? 0.0f : p;
  return x > 88.7228317f ? HUGE_VALF : p;
}

#if defined(__CUDA_ARCH__) || defined(LMF_CUDA_EMULATION)
#if !defined(__CUDA_ARCH__)
// The special function unit turns numbers below 2^-126 into 0.
LMF_HD float flush(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; }
#endif

// 2^x and 1 / x by the special function unit, to about 2 and 1 ulp; results below 2^-126 become 0.
LMF_HD float exp2_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return flush(exp2f(x));
#endif
}

LMF_HD float reciprocal_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return flush(1.0f / x);
#endif
}

// exp(-x) = 2^t with t = -x / ln 2 in two floats: a single one would lose as many bits as t has before the point.
// Beyond +-128 the result is already 1 or 0. The divisor is scaled by 2^-4 and the quotient by 2^4, because the unit
// returns 0 for the reciprocal of a number above 2^126.
LMF_HD float sigmoid(float x) {
  const float y = fminf(fmaxf(-x, -128.0f), 128.0f);
  const float t = y * 1.44269504088896341f;
  const float rest = fmaf(y, 1.925963033500e-8f, fmaf(y, 1.44269504088896341f, -t));
  const float exp_16th = exp2_approx(t) * fmaf(rest, 0.693147180559945f / 16.0f, 1.0f / 16.0f);
  return reciprocal_approx(1.0f / 16.0f + exp_16th) * (1.0f / 16.0f);
}
#else
LMF_HD float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }
#endif

struct SwigluGrad {
  float gate, up, y;
};

LMF_HD float swiglu_element(float gate, float up) { return gate * sigmoid(gate) * up; }

LMF_HD SwigluGrad swiglu_backward_element(float dy, float gate, float up) {
  const float s = sigmoid(gate);
  const float silu = gate * s;
  return {dy * up * (s + silu * (1.0f - s)), dy * silu, silu * up};
}

}  // namespace LMF_ISA
}  // namespace lmf
