// Device, stream, launches and registration of the ops in csrc/cuda. Nothing here waits for the device, and all memory
// comes from torch's allocator, so every op can be captured into a CUDA graph.
//
// tests/kernels/cuda_emulation compiles the same sources for the CPU; its cuda_emulation.h replaces LMF_LAUNCH and Gpu.

#pragma once

#include <initializer_list>

#include "../common/op_arguments.h"
#include "device.cuh"

// Registers CUDA implementations: LMF_CUDA_LIBRARY_IMPL(m) { m.impl("swiglu", TORCH_BOX(&swiglu)); }
#define LMF_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(lmfusion, CUDA, m)

#ifndef LMF_CUDA_EMULATION

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

// Part of libtorch_cuda, which a torch for CPUs lacks. Weak, so that this library loads with such a torch too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

// Launches kernel<<<grid, block, 0, stream>>>(arguments...); parenthesise a kernel that is an instance of a template.
#define LMF_LAUNCH(kernel, grid, block, stream, ...)                 \
  do {                                                               \
    (kernel)<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__);         \
    ::lmf::check_cuda(cudaGetLastError(), "the launch of " #kernel); \
  } while (false)

namespace lmf {

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, " failed: ", cudaGetErrorString(error));
}

// The device of a tensor, current for as long as this lives, and torch's current stream there.
class Gpu {
 public:
  explicit Gpu(const Tensor& beside) : device_(beside.get_device_index()), guard_(device_) {
    STD_TORCH_CHECK(
        aoti_torch_get_current_cuda_stream != nullptr,
        "torch must be built with CUDA for tensors on a GPU; install a torch that is");
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &handle));
    stream = static_cast<cudaStream_t>(handle);
  }

  int64_t num_multiprocessors() const {
    int count = 0;
    check_cuda(
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_),
        "the query of the number of multiprocessors");
    return count;
  }

  cudaStream_t stream;

 private:
  torch::stable::accelerator::DeviceIndex device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace lmf

#endif  // LMF_CUDA_EMULATION

namespace lmf {

// Calls f(T{}) with the element type T of `dtype`.
template <typename F>
void with_gpu_element_type(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Half) {
    f(float16{});
  } else {
    with_element_type(dtype, f);
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Blocks for rows of `width` accesses, `in_flight` of them per thread: threadIdx.x and blockIdx.x run along a row,
// threadIdx.y and blockIdx.y over the rows. Kernels loop over the rows, because gridDim.y is limited. Threads need no
// division to find their row.
struct RowsGrid {
  static constexpr int64_t kMaxGridY = 65535;
  dim3 grid, block;

  RowsGrid(int64_t width, int64_t num_rows, int64_t in_flight, int64_t num_threads) {
    const int64_t chunks = ceil_div(width, in_flight * num_threads);
    const int64_t threads_x = round_up(ceil_div(width, chunks * in_flight), LMF_ISA::kWarp);
    const int64_t threads_y = num_threads / threads_x;
    block = dim3(threads_x, threads_y);
    grid = dim3(chunks, std::min(kMaxGridY, ceil_div(num_rows, threads_y)));
  }
};

// Whether rows of this width that start here can be read in packs of 16 bytes. Null pointers are never read.
inline bool is_aligned(int64_t row_bytes, std::initializer_list<const void*> starts) {
  bool aligned = row_bytes % 16 == 0;
  for (const void* start : starts) aligned = aligned && reinterpret_cast<uintptr_t>(start) % 16 == 0;
  return aligned;
}

}  // namespace lmf
