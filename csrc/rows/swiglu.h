// What does SwiGLU compute for one element? Shared by host and device.
//
//   y = gate * sigmoid(gate) * up

#pragma once

#include <math.h>

#include "scalar.h"

namespace lmf {
namespace LMF_ISA {

// exp(x) to about 1 ulp for x in [-87, 88], 0 below and infinity above; NaN stays NaN. Free of branches and calls, so
// that loops over it vectorise: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial in r (Cephes' expf), and n added to
// the exponent.
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
  return x > 88.0f ? HUGE_VALF : p;
}

LMF_HD float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

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
