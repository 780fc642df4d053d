// Sums of weight gradients over rows, with the same bits in every run. Each block writes float32 partial sums of its
// own, and a second kernel adds them in a fixed order. Nothing is atomic, and the distribution of the rows depends only
// on their number and the device's size.

#pragma once

#include "launch.cuh"

namespace lmf {
namespace LMF_ISA {

constexpr int kMaxSums = 4;
constexpr int kSumColumns = 32, kSumRows = 32;

// out[j] = sum over i < num_partials of partials[i * stride + j], for j < width.
template <typename T>
struct PartialSum {
  const float* partials;
  T* out;
  int64_t num_partials, stride, width;
};

template <typename T>
struct PartialSums {
  PartialSum<T> sum[kMaxSums];
};

// blockIdx.y: which sum. blockIdx.x: which kSumColumns of its columns.
template <typename T>
__global__ void __launch_bounds__(kSumColumns* kSumRows) sum_partials_kernel(const PartialSums<T> sums) {
  __shared__ float subtotals[kSumRows][kSumColumns + 1];
  PartialSum<T> sum = sums.sum[0];
#pragma unroll
  for (int i = 1; i < kMaxSums; ++i) {
    if (blockIdx.y == i) sum = sums.sum[i];
  }
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x;
  float subtotal = 0.0f;
  if (column < sum.width) {
#pragma unroll 4
    for (int64_t i = threadIdx.y; i < sum.num_partials; i += kSumRows) {
      subtotal += sum.partials[i * sum.stride + column];
    }
  }
  subtotals[threadIdx.y][threadIdx.x] = subtotal;
  __syncthreads();
  // Transposed: warp y adds up column y.
  const float total = lane_sum(subtotals[threadIdx.x][threadIdx.y], kWarp);
  const int64_t out_column = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.y;
  if (threadIdx.x == 0 && out_column < sum.width) sum.out[out_column] = narrow<T>(total);
}

template <typename T>
void launch_sums(const std::vector<PartialSum<T>>& wanted, const Gpu& gpu) {
  PartialSums<T> sums = {};
  int64_t width = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    sums.sum[i] = wanted[i];
    width = std::max(width, wanted[i].width);
  }
  if (width == 0) return;
  const dim3 grid(ceil_div(width, kSumColumns), wanted.size()), block(kSumColumns, kSumRows);
  LMF_LAUNCH((sum_partials_kernel<T>), grid, block, gpu.stream, sums);
}

}  // namespace LMF_ISA
}  // namespace lmf
