// Vectors for attention on the CPU: one register of floats of the instruction set that this file is compiled for, and
// the few operations that attention needs. Vector extensions of GCC and Clang instead of intrinsics work on any
// architecture.

#pragma once

#include <stdint.h>

#define LMF_INLINE inline __attribute__((always_inline))

namespace lmf::LMF_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float Vec __attribute__((vector_size(kVectorBytes)));
typedef int32_t IntVec __attribute__((vector_size(kVectorBytes)));
typedef float UnalignedVec __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));

typedef int32_t UnalignedIntVec __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));

LMF_INLINE Vec load(const float* x) { return *reinterpret_cast<const UnalignedVec*>(x); }
LMF_INLINE IntVec load(const int32_t* x) { return *reinterpret_cast<const UnalignedIntVec*>(x); }
LMF_INLINE void store(float* x, Vec value) { *reinterpret_cast<UnalignedVec*>(x) = value; }
LMF_INLINE Vec broadcast(float x) { return x - Vec{}; }

LMF_INLINE Vec select(IntVec condition, Vec yes, Vec no) { return condition ? yes : no; }
LMF_INLINE Vec maximum(Vec a, Vec b) { return select(a > b, a, b); }

// [0, 1, 2, ...]
LMF_INLINE IntVec iota() {
  IntVec index{};
  for (int lane = 0; lane < kLanes; ++lane) index[lane] = lane;
  return index;
}

// Rotates lanes: lane i of the result is lane (i + kShift) % kLanes of x. With max or + it is one step of a reduction.
template <int kShift>
LMF_INLINE Vec rotate(Vec x) {
#if defined(__clang__)
  Vec rotated;
  for (int lane = 0; lane < kLanes; ++lane) rotated[lane] = x[(lane + kShift) % kLanes];
  return rotated;
#else
  return __builtin_shuffle(x, (iota() + kShift) % kLanes);
#endif
}

LMF_INLINE float max_of_lanes(Vec x) {
  if constexpr (kLanes >= 16) x = maximum(x, rotate<8>(x));
  if constexpr (kLanes >= 8) x = maximum(x, rotate<4>(x));
  x = maximum(x, rotate<2>(x));
  x = maximum(x, rotate<1>(x));
  return x[0];
}

LMF_INLINE float sum_of_lanes(Vec x) {
  if constexpr (kLanes >= 16) x += rotate<8>(x);
  if constexpr (kLanes >= 8) x += rotate<4>(x);
  x += rotate<2>(x);
  x += rotate<1>(x);
  return x[0];
}

constexpr float kLog2e = 1.44269504088896340736f;
constexpr double kLn2 = 0.69314718055994530942;

// 2 ** x for x <= 127, within 1 ulp; exactly 0 below the normal floats; NaN stays NaN.
LMF_INLINE Vec exp2(Vec x) {
  // 1.5 * 2 ** 23: adding it leaves round(x) in the low bits. With 127 more, these are the exponent bits of
  // 2 ** round(x).
  const Vec shifter = broadcast(12582912.0f + 127.0f);
  const Vec shifted = x + shifter;
  const Vec fraction = x - (shifted - shifter);  // in [-0.5, 0.5]
  Vec power = 1.535920892e-4f * fraction + 1.339262701e-3f;
  power = power * fraction + 9.618384764e-3f;
  power = power * fraction + 5.550347269e-2f;
  power = power * fraction + 2.402264476e-1f;
  power = power * fraction + 6.931471825e-1f;
  power = power * fraction + 1.0f;
  const IntVec whole = reinterpret_cast<IntVec>(shifted) << 23;
  return select(x < -126.0f, Vec{}, power * reinterpret_cast<Vec>(whole));
}

}  // namespace lmf::LMF_ISA
