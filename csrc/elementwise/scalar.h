// Conversion between float32 and elements of float32, bfloat16 and float16. Shared by host and device (float16: only on
// the device). Arithmetic is always float32.

#pragma once

#include <stdint.h>
#include <string.h>

#ifndef LMF_ISA
#define LMF_ISA baseline
#endif

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LMF_HD __host__ __device__ __forceinline__
#else
#define LMF_HD inline __attribute__((always_inline))
#endif

namespace lmf {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
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
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return {static_cast<uint16_t>((is_nan ? 0x7fc00000u : rounded) >> 16)};
#endif
}

#if defined(__CUDACC__)
__device__ __forceinline__ float widen(float16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <>
__device__ __forceinline__ float16 narrow<float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
#elif defined(LMF_CUDA_EMULATION)
LMF_HD float widen(float16 x) {
  _Float16 half;
  memcpy(&half, &x.bits, sizeof(half));
  return static_cast<float>(half);
}

template <>
LMF_HD float16 narrow<float16>(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  float16 result;
  memcpy(&result.bits, &half, sizeof(half));
  return result;
}
#endif

}  // namespace LMF_ISA
}  // namespace lmf
