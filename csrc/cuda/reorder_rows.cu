// Moves rows of any dtype into another order on the GPU, in accesses of 16, 4 or 1 bytes, kAccesses of them in flight
// per thread.
//
// Bytes per row of b bytes: 2 b and 4 of the index; the floor is those bytes over the copy bandwidth.

#include "launch.cuh"

namespace lmf {
namespace LMF_ISA {
namespace {

constexpr int kAccesses = 4;
constexpr int kThreads = 256;

__device__ __forceinline__ void put(uint4* to, uint4 value) { store_words(to, value); }
__device__ __forceinline__ void put(uint32_t* to, uint32_t value) { *to = value; }
__device__ __forceinline__ void put(uint8_t* to, uint8_t value) { *to = value; }

// width: accesses that make up a row. threadIdx.x and blockIdx.x run along a row.
template <typename Access>
__global__ void __launch_bounds__(kThreads)
    reorder_rows_kernel(const Access* x, const int32_t* index, Access* y, int64_t num_rows, int64_t width) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kAccesses * blockDim.x + threadIdx.x;
  const int64_t row_step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; i < num_rows; i += row_step) {
    const Access* from = x + index[i] * width;
    Access* to = y + i * width;
    Access held[kAccesses];
#pragma unroll
    for (int a = 0; a < kAccesses; ++a) {
      const int64_t j = first + a * static_cast<int64_t>(blockDim.x);
      if (j < width) held[a] = from[j];
    }
#pragma unroll
    for (int a = 0; a < kAccesses; ++a) {
      const int64_t j = first + a * static_cast<int64_t>(blockDim.x);
      if (j < width) put(to + j, held[a]);
    }
  }
}

template <typename Access>
void launch(const ReorderRowsTensors& t, const Gpu& gpu) {
  const int64_t width = t.row_bytes / static_cast<int64_t>(sizeof(Access));
  const RowsGrid shape(width, t.num_rows, kAccesses, kThreads);
  LMF_LAUNCH(
      (reorder_rows_kernel<Access>), shape.grid, shape.block, gpu.stream, data<Access>(t.x), data<int32_t>(t.index),
      data<Access>(t.y), t.num_rows, width);
}

Tensor reorder_rows(const Tensor& x, const Tensor& index, const Tensor& inverse) {
  const ReorderRowsTensors t(x, index, inverse);
  if (t.x.numel() == 0) return t.y;
  const Gpu gpu(t.x);
  const auto fits = [&](size_t size) {
    const auto start = reinterpret_cast<uintptr_t>(data<void>(t.x)) | reinterpret_cast<uintptr_t>(data<void>(t.y));
    return t.row_bytes % size == 0 && start % size == 0;
  };
  if (fits(sizeof(uint4))) {
    launch<uint4>(t, gpu);
  } else if (fits(sizeof(uint32_t))) {
    launch<uint32_t>(t, gpu);
  } else {
    launch<uint8_t>(t, gpu);
  }
  return t.y;
}

}  // namespace
}  // namespace LMF_ISA
}  // namespace lmf

LMF_CUDA_LIBRARY_IMPL(m) { m.impl("reorder_rows", TORCH_BOX(&lmf::LMF_ISA::reorder_rows)); }
