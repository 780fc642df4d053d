// Device code that the kernels of csrc/cuda share: 16-byte accesses and sums over the threads of a row.
//
// Kernels use only threadIdx, blockIdx, blockDim, gridDim, static __shared__ arrays, __syncthreads() and shuffles of
// full warps, so that tests/kernels/cuda_emulation can run the same source on the CPU.

#pragma once

#include <type_traits>

#include "../elementwise/scalar.h"

namespace lmf {
namespace LMF_ISA {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxWarps = 32;  // of a block

// Elements of a 16-byte access.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// kCount neighbouring elements as they lie in memory: 16 bytes, or one element if width or address is not aligned.
template <typename T, int kCount>
struct Pack {
  static_assert(kCount == kVector<T>, "a pack is 16 bytes or one element");
  uint32_t words[4];
};

template <typename T>
struct Pack<T, 1> {
  T element;
};

// Writes 16 bytes of global memory in one instruction. For a plain store the compiler does so only in small kernels.
__device__ __forceinline__ void store_words(void* to, uint4 words) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
#else
  *static_cast<uint4*>(to) = words;
#endif
}

template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load(const T* from) {
  if constexpr (kCount == 1) {
    return {*from};
  } else {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    return {{words.x, words.y, words.z, words.w}};
  }
}

template <typename T, int kCount>
__device__ __forceinline__ void store(T* to, const Pack<T, kCount>& pack) {
  if constexpr (kCount == 1) {
    *to = pack.element;
  } else {
    store_words(to, make_uint4(pack.words[0], pack.words[1], pack.words[2], pack.words[3]));
  }
}

// The float32 values of a pack.
template <typename T>
__device__ __forceinline__ void unpack(const Pack<T, 1>& pack, float (&x)[1]) {
  x[0] = widen(pack.element);
}

__device__ __forceinline__ void unpack(const Pack<float, 4>& pack, float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) memcpy(&x[i], &pack.words[i], sizeof(float));
}

__device__ __forceinline__ void unpack(const Pack<bfloat16, 8>& pack, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = pack.words[i] << 16, high = pack.words[i] & 0xffff0000u;
    memcpy(&x[2 * i], &low, sizeof(float));
    memcpy(&x[2 * i + 1], &high, sizeof(float));
  }
}

__device__ __forceinline__ void unpack(const Pack<float16, 8>& pack, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = widen(float16{static_cast<uint16_t>(pack.words[i])});
    x[2 * i + 1] = widen(float16{static_cast<uint16_t>(pack.words[i] >> 16)});
  }
}

// Two values rounded to T, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
#else
  return static_cast<uint32_t>(narrow<T>(high).bits) << 16 | narrow<T>(low).bits;
#endif
}

// A pack of float32 values, rounded to T.
template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> pack_of(const float (&x)[kCount]) {
  Pack<T, kCount> pack;
  if constexpr (kCount == 1) {
    pack.element = narrow<T>(x[0]);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) memcpy(&pack.words[i], &x[i], sizeof(float));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) pack.words[i] = narrow_pair<T>(x[2 * i], x[2 * i + 1]);
  }
  return pack;
}

// Makes the compiler read the pack again, so that it does not keep values computed from it in registers.
template <typename T, int kCount>
__device__ __forceinline__ void forget(Pack<T, kCount>& pack) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(pack.words[0]), "+r"(pack.words[1]), "+r"(pack.words[2]), "+r"(pack.words[3]));
#else
  (void)pack;
#endif
}

// Sums over groups of `size` neighbouring lanes (a power of two); each lane gets its sum. All lanes of the warp call
// it.
__device__ __forceinline__ float lane_sum(float value, int size) {
  for (int distance = size / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// Sums over the threads with this threadIdx.y; each gets the sum. blockDim.x must be a multiple of a warp, and all
// threads of the block must call it. `partial` must not be written again before the next __syncthreads().
__device__ __forceinline__ float row_sum(float value, float (&partial)[kMaxWarps]) {
  value = lane_sum(value, kWarp);
  const int num_warps = static_cast<int>(blockDim.x) / kWarp;
  if (num_warps == 1) return value;
  const int first = static_cast<int>(threadIdx.y) * num_warps;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane == 0) partial[first + static_cast<int>(threadIdx.x) / kWarp] = value;
  __syncthreads();
  return lane_sum(lane < num_warps ? partial[first + lane] : 0.0f, kWarp);
}

}  // namespace LMF_ISA
}  // namespace lmf
