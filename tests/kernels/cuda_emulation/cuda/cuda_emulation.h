// The CUDA that a .cu file sees when g++ compiles it, included before everything else: CUDA's keywords, types and
// functions as far as csrc/cuda uses them, and the replacements for launch.cuh. Ops are registered as
// torch.ops.lmfusion_emulated, for tensors on the CPU.
//
// There are no functions that synchronise with the host and no atomics: a kernel that needs one does not compile. The
// emulation does not show speed, the code that nvcc generates, or the GPU's own rounding of exp2, reciprocal and root.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// ---- Registration ---------------------------------------------------------------------------------------------------

#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(library, m) STABLE_TORCH_LIBRARY_FRAGMENT(library##_emulated, m)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(library##_emulated, CPU, m, C10_UID)

// ---- Types and built-in variables -----------------------------------------------------------------------------------

using dim3 = lmf_emulation::Dim3;
#define threadIdx (lmf_emulation::builtins.thread_index)
#define blockIdx (lmf_emulation::builtins.block_index)
#define blockDim (lmf_emulation::builtins.block_dim)
#define gridDim (lmf_emulation::builtins.grid_dim)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

// ---- Host functions -------------------------------------------------------------------------------------------------

using cudaStream_t = void*;

namespace lmf_emulation {

template <typename... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<std::decay_t<Parameters>...> arguments;

  static void invoke(const void* self) {
    const Call& call = *static_cast<const Call*>(self);
    std::apply(call.kernel, call.arguments);
  }
};

template <typename... Parameters, typename... Arguments>
void launch(
    const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
    Arguments&&... arguments) {
  const Call<Parameters...> call = {kernel, {std::forward<Arguments>(arguments)...}};
  run({name, grid, block, stream, &call, sizeof(call), &Call<Parameters...>::invoke});
}

}  // namespace lmf_emulation

// The kernel may be parenthesised, for commas among its template arguments.
#define LMF_LAUNCH(kernel, grid, block, stream, ...) \
  lmf_emulation::launch(#kernel, (kernel), (grid), (block), (stream), __VA_ARGS__)

namespace lmf {

struct Gpu {
  explicit Gpu(const torch::stable::Tensor&) {}
  int64_t num_multiprocessors() const { return lmf_emulation::num_multiprocessors; }
  cudaStream_t stream = lmf_emulation::current_stream();
};

}  // namespace lmf

namespace lmf_emulation {

// ---- Device functions -----------------------------------------------------------------------------------------------

template <typename T>
T shuffle(WarpOp op, int line, uint32_t mask, T value, uint32_t argument, int width = kWarpSize) {
  static_assert(std::is_arithmetic_v<T>, "CUDA shuffles numbers of 4 and 8 bytes");
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles numbers of 4 and 8 bytes");
  WarpCall call = {op, mask, argument, static_cast<uint32_t>(width), line, sizeof(T)};
  memcpy(call.value, &value, sizeof(T));
  warp_call(call);
  memcpy(&value, call.value, sizeof(T));
  return value;
}

inline void sync_warp(int line, uint32_t mask = 0xffffffffu) {
  WarpCall call = {WarpOp::kSync, mask, 0, kWarpSize, line};
  warp_call(call);
}

}  // namespace lmf_emulation

#define __syncthreads() lmf_emulation::sync_threads(__FILE__, __LINE__)
#define __syncwarp(...) lmf_emulation::sync_warp(__LINE__, ##__VA_ARGS__)
#define __shfl_sync(mask, ...) lmf_emulation::shuffle(lmf_emulation::WarpOp::kIndex, __LINE__, mask, __VA_ARGS__)
#define __shfl_xor_sync(mask, ...) lmf_emulation::shuffle(lmf_emulation::WarpOp::kXor, __LINE__, mask, __VA_ARGS__)
#define __shfl_up_sync(mask, ...) lmf_emulation::shuffle(lmf_emulation::WarpOp::kUp, __LINE__, mask, __VA_ARGS__)
#define __shfl_down_sync(mask, ...) lmf_emulation::shuffle(lmf_emulation::WarpOp::kDown, __LINE__, mask, __VA_ARGS__)
