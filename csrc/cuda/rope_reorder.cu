// RoPE, QK norm and the reordering from tower to sequence order on the GPU, one launch for both towers. The backward is
// in rope_reorder_backward.cu.
//
// Bytes per row, e = bytes of an element, W = (H + 2 H_kv) D: 2 e W (reads qkv, writes q, k, v), 4 D of angles and 8 of
// indices. The floor is those bytes over the copy bandwidth. With a cache for few rows the latency of three dependent
// loads (index, angles, slot) is the floor, so every head gets threads of its own.

#include "rope_reorder.cuh"

namespace lmf {
namespace LMF_ISA {
namespace {

constexpr int kHeadsEach = 4;        // per thread, for many rows
constexpr int kHeadsEachCached = 1;  // for few rows

template <typename T>
struct RopeTower {
  const T* qkv;
  const T* q_norm;  // null: none, as k_norm
  const T* k_norm;
};

template <typename T>
struct RopeArguments {
  RopeTower<T> tower[2];
  const float* cos;
  const float* sin;
  const int32_t* sequence_row;
  const int32_t* query_row;
  const int32_t* key_slot;  // by sequence index; null: that index
  T* q_constant;
  T* q;
  T* k;
  T* v;
  int64_t num_rows, num_text, num_constant;
  Heads heads;
  float eps;
};

// Source and target of a row.
template <typename T>
struct RopeRow {
  RopeTower<T> tower;
  const T* qkv;
  int64_t angle;

  __device__ __forceinline__ RopeRow(const RopeArguments<T>& arguments, int64_t i) {
    const bool is_image = i >= arguments.num_text;
    // Members are selected one by one: indexing with a variable would put the arguments into local memory.
    tower = arguments.tower[0];
    if (is_image) tower = arguments.tower[1];
    qkv = tower.qkv + (is_image ? i - arguments.num_text : i) * arguments.heads.width();
    angle = arguments.sequence_row[i];
  }

  __device__ __forceinline__ T* target(const RopeArguments<T>& arguments, int64_t i, HeadKind kind) const {
    if (kind == kQuery) {
      const int64_t to = arguments.query_row[i], width = arguments.heads.q_width();
      return to < arguments.num_constant ? arguments.q_constant + to * width
                                         : arguments.q + (to - arguments.num_constant) * width;
    }
    const int64_t to = arguments.key_slot != nullptr ? arguments.key_slot[angle] : angle;
    return (kind == kKey ? arguments.k : arguments.v) + to * arguments.heads.kv_width();
  }

  __device__ __forceinline__ const T* norm(HeadKind kind) const {
    return kind == kQuery ? tower.q_norm : kind == kKey ? tower.k_norm : nullptr;
  }
};

template <typename T, int kHeads, bool kNorms>
__global__ void __launch_bounds__(kRopeThreads) rope_reorder_kernel(const RopeArguments<T> arguments) {
  constexpr int kCount = kVector<T>;
  const int half = arguments.heads.half, j = threadIdx.x * kCount;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  const HeadGroup<kHeads> group(arguments.heads, blockIdx.y * blockDim.y + threadIdx.y);
  const int count = i < arguments.num_rows && j < half ? group.count : 0;
  const RopeRow<T> row(arguments, i < arguments.num_rows ? i : 0);

  Pack<T, kCount> first[kHeads], second[kHeads];
  const T* in = row.qkv + group.offset(arguments.heads) + j;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h >= count) continue;
    first[h] = load<T, kCount>(in + h * 2 * half);
    second[h] = load<T, kCount>(in + h * 2 * half + half);
  }
  float rstd[kHeads];
  if constexpr (kNorms) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float squares = 0.0f;
      if (h < count) {
        float a[kCount], b[kCount];
        unpack(first[h], a);
        unpack(second[h], b);
#pragma unroll
        for (int k = 0; k < kCount; ++k) squares += a[k] * a[k] + b[k] * b[k];
      }
      rstd[h] = norm_rstd(lane_sum(squares, blockDim.x), 2 * half, arguments.eps);
    }
  }
  if (count == 0) return;
  T* out = row.target(arguments, i, group.kind) + static_cast<int64_t>(group.first) * 2 * half + j;
  if (group.kind == kValue) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h >= count) continue;
      store(out + h * 2 * half, first[h]);
      store(out + h * 2 * half + half, second[h]);
    }
    return;
  }
  float cos[kCount], sin[kCount];
  load_floats(arguments.cos + row.angle * half + j, cos);
  load_floats(arguments.sin + row.angle * half + j, sin);
  const T* norm = kNorms ? row.norm(group.kind) : nullptr;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h >= count) continue;
    float a[kCount], b[kCount];
    unpack(first[h], a);
    unpack(second[h], b);
    if constexpr (kNorms) {
      if (norm != nullptr) {
        float w[kCount];
        unpack(load<T, kCount>(norm + j), w);
#pragma unroll
        for (int k = 0; k < kCount; ++k) a[k] = norm_element(a[k], w[k], rstd[h]);
        unpack(load<T, kCount>(norm + half + j), w);
#pragma unroll
        for (int k = 0; k < kCount; ++k) b[k] = norm_element(b[k], w[k], rstd[h]);
      }
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const RopePair y = rotate({a[k], b[k]}, cos[k], sin[k]);
      a[k] = y.first;
      b[k] = y.second;
    }
    store(out + h * 2 * half, pack_of<T, kCount>(a));
    store(out + h * 2 * half + half, pack_of<T, kCount>(b));
  }
}

// A warp for each row and head, element by element, for any size of head.
template <typename T>
__global__ void __launch_bounds__(kRopeThreads) rope_reorder_any_kernel(const RopeArguments<T> arguments) {
  const int half = arguments.heads.half;
  const int64_t i = blockIdx.x;
  const HeadGroup<1> group(arguments.heads, blockIdx.y * blockDim.y + threadIdx.y);
  if (group.kind == kNone) return;  // the whole warp
  const RopeRow<T> row(arguments, i);
  const T* in = row.qkv + group.offset(arguments.heads);
  T* out = row.target(arguments, i, group.kind) + static_cast<int64_t>(group.first) * 2 * half;
  const T* norm = row.norm(group.kind);
  float rstd = 1.0f;
  if (norm != nullptr) {
    float squares = 0.0f;
    for (int j = threadIdx.x; j < 2 * half; j += kWarp) squares += widen(in[j]) * widen(in[j]);
    rstd = norm_rstd(lane_sum(squares, kWarp), 2 * half, arguments.eps);
  }
  for (int j = threadIdx.x; j < half; j += kWarp) {
    RopePair x = {widen(in[j]), widen(in[half + j])};
    if (norm != nullptr) {
      x = {norm_element(x.first, widen(norm[j]), rstd), norm_element(x.second, widen(norm[half + j]), rstd)};
    }
    if (group.kind != kValue) {
      x = rotate(x, arguments.cos[row.angle * half + j], arguments.sin[row.angle * half + j]);
    }
    out[j] = narrow<T>(x.first);
    out[half + j] = narrow<T>(x.second);
  }
}

template <typename T, int kHeads>
void launch_packs(const RopeArguments<T>& arguments, bool has_norms, const Gpu& gpu) {
  const HeadsGrid shape(arguments.heads, kVector<T>, kHeads);
  const dim3 grid = shape.grid(ceil_div(arguments.num_rows, shape.block_rows)), block = shape.block();
  if (has_norms) {
    LMF_LAUNCH((rope_reorder_kernel<T, kHeads, true>), grid, block, gpu.stream, arguments);
  } else {
    LMF_LAUNCH((rope_reorder_kernel<T, kHeads, false>), grid, block, gpu.stream, arguments);
  }
}

template <typename T>
void launch(const RopeArguments<T>& arguments, bool has_norms, const Gpu& gpu) {
  if (arguments.num_rows == 0) return;
  bool aligned = fits_packs(arguments.heads, kVector<T>) &&
                 is_aligned(0, {arguments.cos, arguments.sin, arguments.q_constant, arguments.q}) &&
                 is_aligned(0, {arguments.k, arguments.v});
  for (const RopeTower<T>& tower : arguments.tower) {
    aligned = aligned && is_aligned(0, {tower.qkv, tower.q_norm, tower.k_norm});
  }
  if (!aligned) {
    const int64_t warps = kRopeThreads / kWarp;
    const dim3 grid(arguments.num_rows, ceil_div(arguments.heads.num_heads + 2 * arguments.heads.num_kv_heads, warps));
    LMF_LAUNCH((rope_reorder_any_kernel<T>), grid, dim3(kWarp, warps), gpu.stream, arguments);
  } else if (arguments.key_slot != nullptr) {
    launch_packs<T, kHeadsEachCached>(arguments, has_norms, gpu);
  } else {
    launch_packs<T, kHeadsEach>(arguments, has_norms, gpu);
  }
}

// The arguments of the kernel without its targets.
template <typename T>
RopeArguments<T> inputs(const RopeReorderTensors& t, int64_t num_text, double eps) {
  const auto rows = towers_of<T>(t.qkv, num_text);
  RopeArguments<T> arguments = {};
  arguments.tower[0] = {rows.rows[0], t.norms.weight<T>(0), t.norms.weight<T>(1)};
  arguments.tower[1] = {rows.rows[1], t.norms.weight<T>(2), t.norms.weight<T>(3)};
  arguments.cos = data<float>(t.cos);
  arguments.sin = data<float>(t.sin);
  arguments.sequence_row = data<int32_t>(t.sequence_row);
  arguments.num_rows = t.num_rows;
  arguments.num_text = num_text;
  arguments.heads = heads_of(t.num_heads, t.num_kv_heads, t.head_dim);
  arguments.eps = static_cast<float>(eps);
  return arguments;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rope_reorder(
    const Tensors& qkv, const Tensor& cos, const Tensor& sin, const Tensor& tower_to_sequence,
    const Tensor& query_row_in, int64_t num_text, int64_t num_constant, int64_t num_heads,
    const OptionalTensor& text_q_norm, const OptionalTensor& text_k_norm, const OptionalTensor& image_q_norm,
    const OptionalTensor& image_k_norm, double eps) {
  const RopeReorderTensors t(
      qkv, cos, sin, tower_to_sequence, num_text, num_heads,
      {&text_q_norm, &text_k_norm, &image_q_norm, &image_k_norm});
  check_num_constant(num_constant, num_text);
  const Tensor query_row = check_index(query_row_in, t.num_rows, t.num_rows, t.qkv[0], "query_row");
  const RopeReorderResults results(t, num_constant);
  const Gpu gpu(t.qkv[0]);
  with_gpu_element_type(t.dtype(), [&](auto zero) {
    using T = decltype(zero);
    RopeArguments<T> arguments = inputs<T>(t, num_text, eps);
    arguments.query_row = data<int32_t>(query_row);
    arguments.num_constant = num_constant;
    arguments.q_constant = data<T>(results.q_constant);
    arguments.q = data<T>(results.q);
    arguments.k = data<T>(results.k);
    arguments.v = data<T>(results.v);
    launch(arguments, t.norms.has_any(), gpu);
  });
  return {results.q_constant, results.q, results.k, results.v};
}

Tensor rope_reorder_cached(
    const Tensors& qkv, const Tensor& cos, const Tensor& sin, const Tensor& tower_to_sequence,
    const Tensor& key_slot_in, int64_t num_text, int64_t num_heads, const OptionalTensor& text_q_norm,
    const OptionalTensor& text_k_norm, const OptionalTensor& image_q_norm, const OptionalTensor& image_k_norm,
    double eps, const Tensor& k_cache, const Tensor& v_cache) {
  const RopeReorderTensors t(
      qkv, cos, sin, tower_to_sequence, num_text, num_heads,
      {&text_q_norm, &text_k_norm, &image_q_norm, &image_k_norm});
  const int64_t num_slots = check_caches(k_cache, v_cache, t.num_kv_heads, t.head_dim, t.qkv[0]);
  const Tensor key_slot = check_index(key_slot_in, t.num_rows, num_slots, t.qkv[0], "key_slot");
  const Tensor q = t.allocate_heads(t.num_rows, num_heads);
  const Gpu gpu(t.qkv[0]);
  with_gpu_element_type(t.dtype(), [&](auto zero) {
    using T = decltype(zero);
    RopeArguments<T> arguments = inputs<T>(t, num_text, eps);
    arguments.query_row = arguments.sequence_row;
    arguments.key_slot = data<int32_t>(key_slot);
    arguments.q = data<T>(q);
    arguments.k = data<T>(k_cache);
    arguments.v = data<T>(v_cache);
    launch(arguments, t.norms.has_any(), gpu);
  });
  return q;
}

}  // namespace
}  // namespace LMF_ISA
}  // namespace lmf

LMF_CUDA_LIBRARY_IMPL(m) {
  m.impl("rope_reorder", TORCH_BOX(&lmf::LMF_ISA::rope_reorder));
  m.impl("rope_reorder_cached", TORCH_BOX(&lmf::LMF_ISA::rope_reorder_cached));
}
