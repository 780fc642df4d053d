// How are float32 and bfloat16 elements read and written? Shared by host and device; arithmetic is always float32.

#pragma once

#include <stdint.h>
#include <string.h>

#ifndef LMF_ISA
#define LMF_ISA baseline
#endif

#if defined(__CUDACC__)
#define LMF_HD __host__ __device__ __forceinline__
#else
#define LMF_HD inline __attribute__((always_inline))
#endif

namespace lmf {

struct bfloat16 {
  uint16_t bits;
};

namespace LMF_ISA {

LMF_HD float widen(float x) { return x; }

LMF_HD float widen(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

template <typename T>
LMF_HD T narrow(float x);

template <>
LMF_HD float narrow<float>(float x) {
  return x;
}

// Rounds to nearest even; NaN becomes the quiet NaN. Compares integers, so that compilers turn the choice into a blend.
template <>
LMF_HD bfloat16 narrow<bfloat16>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return {static_cast<uint16_t>((is_nan ? 0x7fc00000u : rounded) >> 16)};
}

}  // namespace LMF_ISA
}  // namespace lmf
