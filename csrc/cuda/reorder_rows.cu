// Rows of any dtype in another order, on the GPU: moved as they are, in accesses of 16, 4 or 1 bytes, kAccesses of them
// in flight a thread.
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
void launch(const Tensor& x, const Tensor& index, const Tensor& y, int64_t row_bytes, const Gpu& gpu) {
  const int64_t num_rows = x.size(0), width = row_bytes / static_cast<int64_t>(sizeof(Access));
  const RowsGrid shape(width, num_rows, kAccesses, kThreads);
  LMF_LAUNCH(
      (reorder_rows_kernel<Access>), shape.grid, shape.block, gpu.stream, data<Access>(x), data<int32_t>(index),
      data<Access>(y), num_rows, width);
}

Tensor reorder_rows(const Tensor& x_in, const Tensor& index_in, const Tensor& inverse) {
  check_reorder(x_in, inverse);
  const int64_t num_rows = x_in.size(0);
  const Tensor index = check_index(index_in, num_rows, num_rows, x_in, "index");
  const Gpu gpu(x_in);
  const Tensor x = as_contiguous(x_in);
  const Tensor y = allocate_beside(std::vector<int64_t>(x.sizes().begin(), x.sizes().end()), x.scalar_type(), x);
  if (x.numel() == 0) return y;
  const int64_t row_bytes = x.numel() / num_rows * static_cast<int64_t>(x.element_size());
  const auto fits = [&](size_t size) {
    const auto start = reinterpret_cast<uintptr_t>(data<void>(x)) | reinterpret_cast<uintptr_t>(data<void>(y));
    return row_bytes % size == 0 && start % size == 0;
  };
  if (fits(sizeof(uint4))) {
    launch<uint4>(x, index, y, row_bytes, gpu);
  } else if (fits(sizeof(uint32_t))) {
    launch<uint32_t>(x, index, y, row_bytes, gpu);
  } else {
    launch<uint8_t>(x, index, y, row_bytes, gpu);
  }
  return y;
}

}  // namespace
}  // namespace LMF_ISA
}  // namespace lmf

LMF_CUDA_LIBRARY_IMPL(m) { m.impl("reorder_rows", TORCH_BOX(&lmf::LMF_ISA::reorder_rows)); }
