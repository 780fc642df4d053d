// RMSNorm of rows of two towers on the GPU, forward and backward, one launch for both towers.
//
// A row is read once and stays in registers between the sum over it and the scaling: kPacks accesses of 16 bytes per
// thread, with as many threads as that takes. Rows that are not aligned, or too wide, are read twice, element by
// element.
//
// Bytes per row, e = bytes of an element, d = width: forward 2 e d (reads x, writes y), with a residual 4 e d, and e d
// for a kept row; backward 3 e d (reads dy, x, writes dx), e d more each for dresidual and for a recomputed y. Weights
// and the partial sums of their gradients (4 bytes per column and resident row of threads) stay in the L2. The floor is
// those bytes over the copy bandwidth.

#include "../elementwise/rms_norm.h"
#include "launch.cuh"
#include "partials.cuh"

namespace lmf {
namespace LMF_ISA {
namespace {

constexpr int kForwardPacks = 4, kBackwardPacks = 2;
constexpr int kMaxThreads = 1024, kMinThreads = 128, kThreadsOfAnyRow = 256;
// Threads of the backward's block and of a multiprocessor: what 80 registers per thread leave room for, 64 in float32.
template <typename T>
constexpr int kMaxBackwardThreads = sizeof(T) == 4 ? 1024 : 768;

template <typename T>
struct NormTower {
  const T* x;
  const T* residual;  // null: none
  const T* weight;
  T* y;
  T* sum;   // x + residual
  T* kept;  // a copy of the rows from first_kept on of what is normalised; null: none
  int64_t width, first_kept;
};

template <typename T>
struct NormArguments {
  NormTower<T> tower[2];
  float* rstd;
  int64_t num_rows, num_text;
  float eps;
};

template <typename T>
struct NormBackwardTower {
  const T* dy;
  const T* x;
  const T* weight;
  const T* dresidual;  // null: none
  T* dx;
  T* y;             // null: not wanted
  float* partials;  // [rows of threads, width]; null: not wanted
  int64_t num_rows, width;
};

template <typename T>
struct NormBackwardArguments {
  NormBackwardTower<T> tower[2];
  const float* rstd;
  int64_t num_blocks[2];  // that work on a tower, the text tower's first
};

// One row for each threadIdx.y.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_kernel(const NormArguments<T> arguments) {
  constexpr int kCount = kVector<T>, kPacks = kForwardPacks;
  __shared__ float partial[kMaxWarps];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool is_image = i >= arguments.num_text;
  // Members are selected one by one: indexing with a variable would put the arguments into local memory.
  NormTower<T> tower = arguments.tower[0];
  if (is_image) tower = arguments.tower[1];
  const int64_t row = is_image ? i - arguments.num_text : i;
  const int width = i < arguments.num_rows ? static_cast<int>(tower.width) : 0;
  const int first = threadIdx.x * kCount, step = blockDim.x * kCount;

  Pack<T, kCount> x[kPacks], weight[kPacks];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int j = first + p * step;
    if (j < width) x[p] = load<T, kCount>(tower.x + row * tower.width + j);
  }
  if (tower.residual != nullptr) {
    Pack<T, kCount> residual[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int j = first + p * step;
      if (j < width) residual[p] = load<T, kCount>(tower.residual + row * tower.width + j);
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int j = first + p * step;
      if (j >= width) continue;
      float a[kCount], b[kCount];
      unpack(x[p], a);
      unpack(residual[p], b);
#pragma unroll
      for (int k = 0; k < kCount; ++k) a[k] += b[k];
      x[p] = pack_of<T, kCount>(a);
      store(tower.sum + row * tower.width + j, x[p]);
    }
  }
  float squares = 0.0f;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int j = first + p * step;
    if (j >= width) continue;
    weight[p] = load<T, kCount>(tower.weight + j);
    float a[kCount];
    unpack(x[p], a);
#pragma unroll
    for (int k = 0; k < kCount; ++k) squares += a[k] * a[k];
  }
  const float rstd = norm_rstd(row_sum(squares, partial), tower.width, arguments.eps);
  const bool is_kept = tower.kept != nullptr && row >= tower.first_kept;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int j = first + p * step;
    if (j >= width) continue;
    float a[kCount], w[kCount];
    unpack(x[p], a);
    unpack(weight[p], w);
#pragma unroll
    for (int k = 0; k < kCount; ++k) a[k] = norm_element(a[k], w[k], rstd);
    store(tower.y + row * tower.width + j, pack_of<T, kCount>(a));
    if (is_kept) store(tower.kept + (row - tower.first_kept) * tower.width + j, x[p]);
  }
  if (threadIdx.x == 0 && i < arguments.num_rows) arguments.rstd[i] = rstd;
}

// One row per block, any width.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_any_kernel(const NormArguments<T> arguments) {
  __shared__ float partial[kMaxWarps];
  const int64_t i = blockIdx.x;
  const bool is_image = i >= arguments.num_text;
  NormTower<T> tower = arguments.tower[0];
  if (is_image) tower = arguments.tower[1];
  const int64_t row = is_image ? i - arguments.num_text : i, start = row * tower.width;
  const bool is_kept = tower.kept != nullptr && row >= tower.first_kept;
  const T* normed = tower.residual != nullptr ? tower.sum : tower.x;
  float squares = 0.0f;
  for (int64_t j = threadIdx.x; j < tower.width; j += blockDim.x) {
    if (tower.residual != nullptr) {
      tower.sum[start + j] = narrow<T>(widen(tower.x[start + j]) + widen(tower.residual[start + j]));
    }
    const T element = normed[start + j];
    if (is_kept) tower.kept[(row - tower.first_kept) * tower.width + j] = element;
    squares += widen(element) * widen(element);
  }
  const float rstd = norm_rstd(row_sum(squares, partial), tower.width, arguments.eps);
  for (int64_t j = threadIdx.x; j < tower.width; j += blockDim.x) {
    tower.y[start + j] = narrow<T>(norm_element(widen(normed[start + j]), widen(tower.weight[j]), rstd));
  }
  if (threadIdx.x == 0) arguments.rstd[i] = rstd;
}

// The rows of one tower that a block works on.
template <typename T>
struct BackwardBlock {
  NormBackwardTower<T> tower;
  const float* rstd;
  int64_t block, num_blocks;

  __device__ __forceinline__ explicit BackwardBlock(const NormBackwardArguments<T>& arguments) {
    const bool is_image = blockIdx.x >= arguments.num_blocks[0];
    tower = arguments.tower[0];
    if (is_image) tower = arguments.tower[1];
    rstd = arguments.rstd + (is_image ? arguments.tower[0].num_rows : 0);
    block = blockIdx.x - (is_image ? arguments.num_blocks[0] : 0);
    num_blocks = is_image ? arguments.num_blocks[1] : arguments.num_blocks[0];
  }
};

// Every threadIdx.y of every block strides over the rows of one tower, with sums of the weight gradient in registers.
template <typename T>
__global__ void __launch_bounds__(kMaxBackwardThreads<T>)
    rms_norm_backward_kernel(const NormBackwardArguments<T> arguments) {
  constexpr int kCount = kVector<T>, kPacks = kBackwardPacks;
  __shared__ float partial[2][kMaxWarps];
  const BackwardBlock<T> mine(arguments);
  const NormBackwardTower<T>& tower = mine.tower;
  const int first = threadIdx.x * kCount, step = blockDim.x * kCount;
  Pack<T, kCount> weight[kPacks];
  float dweight[kPacks][kCount] = {};
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int j = first + p * step;
    if (j < tower.width) weight[p] = load<T, kCount>(tower.weight + j);
  }
  const int64_t row_step = mine.num_blocks * blockDim.y;
  int parity = 0;
  for (int64_t start = mine.block * blockDim.y; start < tower.num_rows; start += row_step, parity ^= 1) {
    const int64_t row = start + threadIdx.y, offset = row * tower.width;
    const int width = row < tower.num_rows ? static_cast<int>(tower.width) : 0;
    Pack<T, kCount> dy[kPacks], x[kPacks];
    const float rstd = width != 0 ? mine.rstd[row] : 0.0f;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int j = first + p * step;
      if (j >= width) continue;
      dy[p] = load<T, kCount>(tower.dy + offset + j);
      x[p] = load<T, kCount>(tower.x + offset + j);
    }
    float dot = 0.0f;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int j = first + p * step;
      if (j >= width) continue;
      float g[kCount], a[kCount], w[kCount];
      unpack(dy[p], g);
      unpack(x[p], a);
      unpack(weight[p], w);
#pragma unroll
      for (int k = 0; k < kCount; ++k) dot += w[k] * g[k] * a[k];
    }
    // Two buffers alternate, so one sync per row suffices: the next row's sync separates the reads for this row from
    // the writes for the row after the next.
    const float correction = norm_correction(row_sum(dot, partial[parity]), tower.width, rstd);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int j = first + p * step;
      if (j >= width) continue;
      float g[kCount], a[kCount], w[kCount], dx[kCount] = {};
      if (tower.dresidual != nullptr) unpack(load<T, kCount>(tower.dresidual + offset + j), dx);
      unpack(dy[p], g);
      unpack(x[p], a);
      unpack(weight[p], w);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        dx[k] += norm_backward_element(g[k], a[k], w[k], rstd, correction);
        dweight[p][k] += norm_weight_grad(g[k], a[k], rstd);
        a[k] = norm_element(a[k], w[k], rstd);
      }
      store(tower.dx + offset + j, pack_of<T, kCount>(dx));
      if (tower.y != nullptr) store(tower.y + offset + j, pack_of<T, kCount>(a));
    }
  }
  if (tower.partials == nullptr) return;
  float* sums = tower.partials + (mine.block * blockDim.y + threadIdx.y) * tower.width;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int j = first + p * step;
    if (j >= tower.width) continue;
#pragma unroll
    for (int k = 0; k < kCount; k += 4) {
      Pack<float, 4> four;
      memcpy(four.words, &dweight[p][k], sizeof(four.words));
      store(sums + j + k, four);
    }
  }
}

// Any width, one row at a time per block. Sums of the weight gradient are in memory; each element belongs to one
// thread.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_backward_any_kernel(const NormBackwardArguments<T> arguments) {
  __shared__ float partial[2][kMaxWarps];
  const BackwardBlock<T> mine(arguments);
  const NormBackwardTower<T>& tower = mine.tower;
  float* sums = tower.partials != nullptr ? tower.partials + mine.block * tower.width : nullptr;
  if (sums != nullptr) {
    for (int64_t j = threadIdx.x; j < tower.width; j += blockDim.x) sums[j] = 0.0f;
  }
  int parity = 0;
  for (int64_t row = mine.block; row < tower.num_rows; row += mine.num_blocks, parity ^= 1) {
    const int64_t start = row * tower.width;
    float dot = 0.0f;
    for (int64_t j = threadIdx.x; j < tower.width; j += blockDim.x) {
      dot += widen(tower.weight[j]) * widen(tower.dy[start + j]) * widen(tower.x[start + j]);
    }
    const float rstd = mine.rstd[row];
    const float correction = norm_correction(row_sum(dot, partial[parity]), tower.width, rstd);
    for (int64_t j = threadIdx.x; j < tower.width; j += blockDim.x) {
      const float dy = widen(tower.dy[start + j]), x = widen(tower.x[start + j]), weight = widen(tower.weight[j]);
      float dx = norm_backward_element(dy, x, weight, rstd, correction);
      if (tower.dresidual != nullptr) dx += widen(tower.dresidual[start + j]);
      tower.dx[start + j] = narrow<T>(dx);
      if (tower.y != nullptr) tower.y[start + j] = narrow<T>(norm_element(x, weight, rstd));
      if (sums != nullptr) sums[j] += norm_weight_grad(dy, x, rstd);
    }
  }
}

// Threads along a row and rows in a block, for rows of `width` elements with `elements` of them per thread.
struct BlockShape {
  int64_t threads, rows;

  BlockShape(int64_t width, int64_t elements)
      : threads(round_up(std::max<int64_t>(1, ceil_div(width, elements)), kWarp)),
        rows(std::max<int64_t>(1, kMinThreads / threads)) {}
};

Tensors rms_norm(
    const Tensors& x_in, const Tensors& residual_in, const Tensor& text_weight, const Tensor& image_weight,
    int64_t num_text, double eps, int64_t num_constant, bool keep_text, bool keep_image) {
  const RmsNormTensors t(x_in, residual_in, text_weight, image_weight, num_text, num_constant, keep_text, keep_image);
  const int64_t num_rows = t.num_rows;
  const Gpu gpu(t.x[0]);
  with_gpu_element_type(t.x[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto x_rows = towers_of<T>(t.x, num_text), residual_rows = towers_of<T>(t.residual, num_text);
    const auto y_rows = towers_of<T>(t.y, num_text), sum_rows = towers_of<T>(t.sum, num_text);
    NormArguments<T> arguments = {{}, data<float>(t.rstd), num_rows, num_text, static_cast<float>(eps)};
    bool aligned = true;
    for (int i : {0, 1}) {
      NormTower<T>& tower = arguments.tower[i];
      tower = {x_rows.rows[i],   residual_rows.rows[i], data<T>(t.weights[i]), y_rows.rows[i],
               sum_rows.rows[i], t.kept_rows<T>(i),     x_rows.width[i],       t.first_kept[i]};
      aligned =
          aligned &&
          is_aligned(tower.width * sizeof(T), {tower.x, tower.residual, tower.weight, tower.y, tower.sum, tower.kept});
    }
    if (num_rows == 0) return;
    const BlockShape shape(std::max(x_rows.width[0], x_rows.width[1]), kVector<T> * kForwardPacks);
    if (aligned && shape.threads <= kMaxThreads) {
      const dim3 grid(ceil_div(num_rows, shape.rows)), block(shape.threads, shape.rows);
      LMF_LAUNCH((rms_norm_kernel<T>), grid, block, gpu.stream, arguments);
    } else {
      LMF_LAUNCH((rms_norm_any_kernel<T>), dim3(num_rows), dim3(kThreadsOfAnyRow), gpu.stream, arguments);
    }
  });
  return t.results();
}

// Splits `num_blocks` blocks between the towers by their rows: at least one if it has any rows, at most one per row.
void split_blocks(int64_t num_blocks, const int64_t (&num_rows)[2], int64_t rows_per_block, int64_t (&blocks)[2]) {
  const int64_t all = num_rows[0] + num_rows[1];
  for (int i : {0, 1}) {
    const int64_t share = all > 0 ? ceil_div(num_blocks * num_rows[i], all) : 0;
    blocks[i] = std::min(share, ceil_div(num_rows[i], rows_per_block));
  }
}

Tensors rms_norm_backward(
    const Tensors& dy_in, const Tensors& x_in, const Tensor& rstd_in, const Tensor& text_weight,
    const Tensor& image_weight, int64_t num_text, const Tensors& dresidual_in, bool text_grad, bool image_grad,
    bool recompute) {
  const RmsNormBackwardTensors t(
      dy_in, x_in, rstd_in, text_weight, image_weight, num_text, dresidual_in, text_grad, image_grad, recompute);
  const Gpu gpu(t.x[0]);
  with_gpu_element_type(t.x[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto dy_rows = towers_of<T>(t.dy, num_text), x_rows = towers_of<T>(t.x, num_text);
    const auto dresidual_rows = towers_of<T>(t.dresidual, num_text);
    const auto dx_rows = towers_of<T>(t.dx, num_text), y_rows = towers_of<T>(t.y, num_text);
    BlockShape shape(std::max(x_rows.width[0], x_rows.width[1]), kVector<T> * kBackwardPacks);
    bool in_registers = shape.threads <= kMaxBackwardThreads<T>;
    for (int i : {0, 1}) {
      in_registers =
          in_registers && is_aligned(
                              x_rows.width[i] * sizeof(T), {dy_rows.rows[i], x_rows.rows[i], data<T>(t.weights[i]),
                                                            dresidual_rows.rows[i], dx_rows.rows[i], y_rows.rows[i]});
    }
    if (!in_registers) {
      shape.threads = kThreadsOfAnyRow;
      shape.rows = 1;
    }
    NormBackwardArguments<T> arguments = {{}, data<float>(t.rstd), {0, 0}};
    const int64_t blocks_each = kMaxBackwardThreads<T> / (shape.threads * shape.rows);
    split_blocks(gpu.num_multiprocessors() * blocks_each, x_rows.num_rows, shape.rows, arguments.num_blocks);
    Tensors partials;
    std::vector<PartialSum<T>> sums;
    for (int i : {0, 1}) {
      const int64_t width = x_rows.width[i], num_partials = arguments.num_blocks[i] * shape.rows;
      arguments.tower[i] = {
          dy_rows.rows[i],
          x_rows.rows[i],
          data<T>(t.weights[i]),
          dresidual_rows.rows[i],
          dx_rows.rows[i],
          y_rows.rows[i],
          nullptr,
          x_rows.num_rows[i],
          width};
      if (!t.weight_grad[i]) continue;
      partials.push_back(allocate({num_partials, width}, ScalarType::Float, t.x[0]));
      arguments.tower[i].partials = data<float>(partials.back());
      sums.push_back({data<float>(partials.back()), t.dweight<T>(i), num_partials, width, width});
    }
    const dim3 grid(arguments.num_blocks[0] + arguments.num_blocks[1]), block(shape.threads, shape.rows);
    if (t.num_rows > 0 && in_registers) {
      LMF_LAUNCH((rms_norm_backward_kernel<T>), grid, block, gpu.stream, arguments);
    } else if (t.num_rows > 0) {
      LMF_LAUNCH((rms_norm_backward_any_kernel<T>), grid, block, gpu.stream, arguments);
    }
    launch_sums(sums, gpu);
  });
  return t.results();
}

}  // namespace
}  // namespace LMF_ISA
}  // namespace lmf

LMF_CUDA_LIBRARY_IMPL(m) {
  m.impl("rms_norm", TORCH_BOX(&lmf::LMF_ISA::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&lmf::LMF_ISA::rms_norm_backward));
}
