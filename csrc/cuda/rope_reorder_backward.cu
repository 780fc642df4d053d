// Gradients of RoPE, QK norm and the reordering on the GPU: one launch for both towers, and one more for the sums of
// the norms' gradients.
//
// Bytes per active row, e = bytes of an element, W = (H + 2 H_kv) D: 2 e W (reads dq, dk, dv, writes dqkv), with norms
// e (H + H_kv) D more for qkv; 4 D of angles and 8 of indices. The floor is those bytes over the copy bandwidth.

#include "partials.cuh"
#include "rope_reorder.cuh"

namespace lmf {
namespace LMF_ISA {
namespace {

constexpr int kHeadsEach = 4, kHeadsEachNormed = 1;  // per thread
constexpr int64_t kNormedThreads = 768;              // of a multiprocessor, by the registers of the kernel with norms
constexpr int64_t kAnyBlocks = 64;                   // of a multiprocessor, without sums over rows

template <typename T>
struct RopeBackwardTower {
  const T* qkv;     // read with norms only
  const T* q_norm;  // null: none, as k_norm
  const T* k_norm;
  T* dqkv;
};

template <typename T>
struct RopeBackwardArguments {
  RopeBackwardTower<T> tower[2];
  const T* dq;  // by rank, as dk and dv
  const T* dk;
  const T* dv;
  const float* cos;
  const float* sin;
  const int32_t* active_row;
  const int32_t* active_key;  // null: the rank
  float* partials;            // [partials, text q, text k, image q, image k, D]; null: not wanted
  int64_t num_rows, num_live;
  Heads heads;
  float eps;

  // Gradients of the first head of this kind.
  __device__ __forceinline__ const T* source(int64_t rank, HeadKind kind) const {
    if (kind == kQuery) return dq + rank * heads.q_width();
    return (kind == kKey ? dk : dv) + rank * heads.kv_width();
  }
};

// Target of the gradients of a rank.
template <typename T>
struct ActiveRow {
  RopeBackwardTower<T> tower;
  bool is_image;
  int64_t offset, angle;

  __device__ __forceinline__ ActiveRow(const RopeBackwardArguments<T>& arguments, int64_t rank) {
    const int64_t row = arguments.active_row[rank];
    is_image = row >= arguments.num_live;
    // Members are selected one by one: indexing with a variable would put the arguments into local memory.
    tower = arguments.tower[0];
    if (is_image) tower = arguments.tower[1];
    offset = (is_image ? row - arguments.num_live : row) * arguments.heads.width();
    angle = arguments.active_key != nullptr ? arguments.active_key[rank] : rank;
  }

  __device__ __forceinline__ const T* norm(HeadKind kind) const {
    return kind == kQuery ? tower.q_norm : kind == kKey ? tower.k_norm : nullptr;
  }
};

template <typename T>
__global__ void __launch_bounds__(kRopeThreads) rope_backward_kernel(const RopeBackwardArguments<T> arguments) {
  constexpr int kCount = kVector<T>, kHeads = kHeadsEach;
  const int half = arguments.heads.half, j = threadIdx.x * kCount;
  const int64_t rank = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  const HeadGroup<kHeads> group(arguments.heads, blockIdx.y * blockDim.y + threadIdx.y);
  if (rank >= arguments.num_rows || j >= half || group.kind == kNone) return;
  Pack<T, kCount> first[kHeads], second[kHeads];
  const T* in = arguments.source(rank, group.kind) + static_cast<int64_t>(group.first) * 2 * half + j;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h >= group.count) continue;
    first[h] = load<T, kCount>(in + h * 2 * half);
    second[h] = load<T, kCount>(in + h * 2 * half + half);
  }
  const ActiveRow<T> row(arguments, rank);
  T* out = row.tower.dqkv + row.offset + group.offset(arguments.heads) + j;
  if (group.kind == kValue) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h >= group.count) continue;
      store(out + h * 2 * half, first[h]);
      store(out + h * 2 * half + half, second[h]);
    }
    return;
  }
  float cos[kCount], sin[kCount];
  load_floats(arguments.cos + row.angle * half + j, cos);
  load_floats(arguments.sin + row.angle * half + j, sin);
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h >= group.count) continue;
    float a[kCount], b[kCount];
    unpack(first[h], a);
    unpack(second[h], b);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const RopePair dx = rotate_back({a[k], b[k]}, cos[k], sin[k]);
      a[k] = dx.first;
      b[k] = dx.second;
    }
    store(out + h * 2 * half, pack_of<T, kCount>(a));
    store(out + h * 2 * half + half, pack_of<T, kCount>(b));
  }
}

// With norms. Blocks stride over the rows; a thread keeps the sums of its elements' weight gradients, for both towers,
// in shared memory, since in registers they would halve the number of threads.
template <typename T>
__global__ void __launch_bounds__(kRopeThreads, kNormedThreads / kRopeThreads)
    rope_norm_backward_kernel(const RopeBackwardArguments<T> arguments) {
  constexpr int kCount = kVector<T>, kHeads = kHeadsEachNormed;
  __shared__ float sums[2][2 * kCount][kRopeThreads];  // tower, element of the first and second half, thread
  const int num_slots = blockDim.y * blockDim.z, slot = threadIdx.z * blockDim.y + threadIdx.y;
  const int thread = slot * blockDim.x + threadIdx.x, num_threads = num_slots * blockDim.x;
#pragma unroll
  for (int k = 0; k < 2 * kCount; ++k) {
    sums[0][k][thread] = 0.0f;
    sums[1][k][thread] = 0.0f;
  }
  const int half = arguments.heads.half, j = threadIdx.x * kCount;
  const HeadGroup<kHeads> group(arguments.heads, blockIdx.y * blockDim.y + threadIdx.y);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.z;
  for (int64_t start = static_cast<int64_t>(blockIdx.x) * blockDim.z; start < arguments.num_rows; start += step) {
    const int64_t rank = start + threadIdx.z;
    const int count = rank < arguments.num_rows && j < half ? group.count : 0;
    const ActiveRow<T> row(arguments, rank < arguments.num_rows ? rank : 0);
    const T* norm = row.norm(group.kind);
    const T* in = arguments.source(rank, group.kind) + static_cast<int64_t>(group.first) * 2 * half + j;
    const int64_t offset = row.offset + group.offset(arguments.heads) + j;
    const T* x_in = row.tower.qkv + offset;
    T* out = row.tower.dqkv + offset;
    Pack<T, kCount> first[kHeads], second[kHeads], x_first[kHeads], x_second[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h >= count) continue;
      first[h] = load<T, kCount>(in + h * 2 * half);
      second[h] = load<T, kCount>(in + h * 2 * half + half);
      if (norm == nullptr) continue;
      x_first[h] = load<T, kCount>(x_in + h * 2 * half);
      x_second[h] = load<T, kCount>(x_in + h * 2 * half + half);
    }
    float cos[kCount], sin[kCount];
    if (count > 0 && group.kind != kValue) {
      load_floats(arguments.cos + row.angle * half + j, cos);
      load_floats(arguments.sin + row.angle * half + j, sin);
    }
    // Values are unpacked and rotated twice, before and after the sums: keeping them would take twice the registers.
    const auto unpack_turned = [&](int h, float (&a)[kCount], float (&b)[kCount]) {
      unpack(first[h], a);
      unpack(second[h], b);
      if (group.kind == kValue) return;
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const RopePair dx = rotate_back({a[k], b[k]}, cos[k], sin[k]);
        a[k] = dx.first;
        b[k] = dx.second;
      }
    };
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float a[kCount], b[kCount], x[kCount], w[kCount];
      float squares = 0.0f, dot = 0.0f;
      if (h < count && norm != nullptr) {
        unpack_turned(h, a, b);
        unpack(x_first[h], x);
        unpack(load<T, kCount>(norm + j), w);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          squares += x[k] * x[k];
          dot += w[k] * a[k] * x[k];
        }
        unpack(x_second[h], x);
        unpack(load<T, kCount>(norm + half + j), w);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          squares += x[k] * x[k];
          dot += w[k] * b[k] * x[k];
        }
      }
      squares = lane_sum(squares, blockDim.x);
      dot = lane_sum(dot, blockDim.x);
      if (h >= count) continue;
      forget(first[h]);
      forget(second[h]);
      forget(x_first[h]);
      forget(x_second[h]);
      unpack_turned(h, a, b);
      if (norm != nullptr) {
        const float rstd = norm_rstd(squares, 2 * half, arguments.eps);
        const float correction = norm_correction(dot, 2 * half, rstd);
        unpack(x_first[h], x);
        unpack(load<T, kCount>(norm + j), w);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          sums[row.is_image][k][thread] += norm_weight_grad(a[k], x[k], rstd);
          a[k] = norm_backward_element(a[k], x[k], w[k], rstd, correction);
        }
        unpack(x_second[h], x);
        unpack(load<T, kCount>(norm + half + j), w);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          sums[row.is_image][kCount + k][thread] += norm_weight_grad(b[k], x[k], rstd);
          b[k] = norm_backward_element(b[k], x[k], w[k], rstd, correction);
        }
      }
      store(out + h * 2 * half, pack_of<T, kCount>(a));
      store(out + h * 2 * half + half, pack_of<T, kCount>(b));
    }
  }
  if (arguments.partials == nullptr) return;

  // Sums over the block's threads that hold the same elements of the same kind, in the order of the threads.
  const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  __syncthreads();
  for (int column = thread; column < 4 * 2 * half; column += num_threads) {
    const int tower = column / (4 * half), element = column % (2 * half), within = element % half;
    const HeadKind kind = column / (2 * half) % 2 == 0 ? kQuery : kKey;
    const int k = within % kCount + (element < half ? 0 : kCount);
    float sum = 0.0f;
    for (int s = 0; s < num_slots; ++s) {
      const HeadGroup<kHeads> other(arguments.heads, blockIdx.y * blockDim.y + s % blockDim.y);
      if (other.kind == kind) sum += sums[tower][k][s * blockDim.x + within / kCount];
    }
    arguments.partials[block * 4 * 2 * half + column] = sum;
  }
}

// A warp for each head, element by element, for any size of head. Each warp has partial sums of its own in memory.
template <typename T>
__global__ void __launch_bounds__(kRopeThreads) rope_backward_any_kernel(const RopeBackwardArguments<T> arguments) {
  const int half = arguments.heads.half, head_dim = 2 * half;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int num_heads = arguments.heads.num_heads + 2 * arguments.heads.num_kv_heads;
  float* partials = arguments.partials != nullptr ? arguments.partials + warp * 4 * head_dim : nullptr;
  if (partials != nullptr) {
    for (int j = threadIdx.x; j < half; j += kWarp) {
      for (int k = 0; k < 8; ++k) partials[k * half + j] = 0.0f;
    }
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t item = warp; item < arguments.num_rows * num_heads; item += step) {
    const int64_t rank = item / num_heads;
    const HeadGroup<1> group(arguments.heads, static_cast<int>(item % num_heads));
    const ActiveRow<T> row(arguments, rank);
    const T* norm = row.norm(group.kind);
    const T* dy = arguments.source(rank, group.kind) + static_cast<int64_t>(group.first) * head_dim;
    const int64_t offset = row.offset + group.offset(arguments.heads);
    const T* x = row.tower.qkv + offset;
    T* dx = row.tower.dqkv + offset;
    const float* cos = arguments.cos + row.angle * half;
    const float* sin = arguments.sin + row.angle * half;
    const auto turned = [&](int j) -> RopePair {
      const RopePair grad = {widen(dy[j]), widen(dy[half + j])};
      return group.kind == kValue ? grad : rotate_back(grad, cos[j], sin[j]);
    };
    float rstd = 1.0f, correction = 0.0f;
    if (norm != nullptr) {
      float squares = 0.0f, dot = 0.0f;
      for (int j = threadIdx.x; j < half; j += kWarp) {
        const RopePair grad = turned(j);
        const float first = widen(x[j]), second = widen(x[half + j]);
        squares += first * first + second * second;
        dot += widen(norm[j]) * grad.first * first + widen(norm[half + j]) * grad.second * second;
      }
      rstd = norm_rstd(lane_sum(squares, kWarp), head_dim, arguments.eps);
      correction = norm_correction(lane_sum(dot, kWarp), head_dim, rstd);
    }
    for (int j = threadIdx.x; j < half; j += kWarp) {
      RopePair grad = turned(j);
      if (norm != nullptr) {
        const float first = widen(x[j]), second = widen(x[half + j]);
        if (partials != nullptr) {
          float* sums = partials + (2 * row.is_image + (group.kind == kKey)) * head_dim;
          sums[j] += norm_weight_grad(grad.first, first, rstd);
          sums[half + j] += norm_weight_grad(grad.second, second, rstd);
        }
        grad = {
            norm_backward_element(grad.first, first, widen(norm[j]), rstd, correction),
            norm_backward_element(grad.second, second, widen(norm[half + j]), rstd, correction)};
      }
      dx[j] = narrow<T>(grad.first);
      dx[half + j] = narrow<T>(grad.second);
    }
  }
}

Tensors rope_reorder_backward(
    const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensors& qkv, const Tensor& cos, const Tensor& sin,
    const Tensor& active_row, const OptionalTensor& active_key, int64_t num_live, int64_t num_heads,
    const OptionalTensor& text_q_norm, const OptionalTensor& text_k_norm, const OptionalTensor& image_q_norm,
    const OptionalTensor& image_k_norm, double eps, bool text_norm_grad, bool image_norm_grad, bool joined) {
  const RopeReorderBackwardTensors t(
      dq, dk, dv, qkv, cos, sin, active_row, active_key, num_live, num_heads,
      {&text_q_norm, &text_k_norm, &image_q_norm, &image_k_norm}, text_norm_grad, image_norm_grad, joined);
  const int64_t num_rows = t.num_rows, head_dim = t.head_dim;
  const Gpu gpu(t.dq);
  with_gpu_element_type(t.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto x_rows = towers_of<T>(t.qkv, num_live), dx_rows = towers_of<T>(t.dqkv, num_live);
    RopeBackwardArguments<T> arguments = {
        {{x_rows.rows[0], t.norms.weight<T>(0), t.norms.weight<T>(1), dx_rows.rows[0]},
         {x_rows.rows[1], t.norms.weight<T>(2), t.norms.weight<T>(3), dx_rows.rows[1]}},
        data<T>(t.dq),
        data<T>(t.dk),
        data<T>(t.dv),
        data<float>(t.cos),
        data<float>(t.sin),
        data<int32_t>(t.active_row),
        t.active_key ? data<int32_t>(*t.active_key) : nullptr,
        nullptr,
        num_rows,
        num_live,
        heads_of(num_heads, t.num_kv_heads, head_dim),
        static_cast<float>(eps)};
    bool aligned = fits_packs(arguments.heads, kVector<T>) &&
                   is_aligned(0, {arguments.dq, arguments.dk, arguments.dv, arguments.cos, arguments.sin});
    for (const RopeBackwardTower<T>& tower : arguments.tower) {
      aligned = aligned && is_aligned(0, {tower.qkv, tower.q_norm, tower.k_norm, tower.dqkv});
    }
    const bool has_norms = t.norms.has_any();
    const HeadsGrid shape(arguments.heads, kVector<T>, has_norms ? kHeadsEachNormed : kHeadsEach);
    const int64_t blocks = ceil_div(num_rows, shape.block_rows);
    // With norms there are sums over rows: launch only as many blocks as are resident at once, to have few partial
    // sums.
    const int64_t size = gpu.num_multiprocessors();
    const int64_t resident =
        std::min(blocks, ceil_div(size * (kNormedThreads / shape.num_threads()), shape.grid_groups));
    const int64_t warps = kRopeThreads / kWarp, all_heads = num_heads + 2 * t.num_kv_heads;
    const int64_t any_blocks = std::min(
        size * (has_norms ? kNormedThreads / kRopeThreads : kAnyBlocks), ceil_div(num_rows * all_heads, warps));

    OptionalTensor partials;
    std::vector<PartialSum<T>> sums;
    const int64_t num_partials = aligned ? resident * shape.grid_groups : any_blocks * warps;
    if (!t.dnorms.empty()) {
      partials = allocate({num_partials, 4, head_dim}, ScalarType::Float, t.dq);
      arguments.partials = data<float>(*partials);
    }
    auto dnorm = t.dnorms.begin();
    for (int i = 0; i < 4; ++i) {
      if (!t.norm_grad[i]) continue;
      sums.push_back({arguments.partials + i * head_dim, data<T>(*dnorm++), num_partials, 4 * head_dim, head_dim});
    }
    if (num_rows > 0 && !aligned) {
      LMF_LAUNCH((rope_backward_any_kernel<T>), dim3(any_blocks), dim3(kWarp, warps), gpu.stream, arguments);
    } else if (num_rows > 0 && has_norms) {
      LMF_LAUNCH((rope_norm_backward_kernel<T>), shape.grid(resident), shape.block(), gpu.stream, arguments);
    } else if (num_rows > 0) {
      LMF_LAUNCH((rope_backward_kernel<T>), shape.grid(blocks), shape.block(), gpu.stream, arguments);
    }
    launch_sums(sums, gpu);
  });
  return t.results();
}

}  // namespace
}  // namespace LMF_ISA
}  // namespace lmf

LMF_CUDA_LIBRARY_IMPL(m) { m.impl("rope_reorder_backward", TORCH_BOX(&lmf::LMF_ISA::rope_reorder_backward)); }
