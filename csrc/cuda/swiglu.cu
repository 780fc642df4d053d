// SwiGLU on the GPU, one launch for two towers. Every thread keeps kPacks accesses of 16 bytes per operand in flight.
//
// Bytes per row, e = bytes of an element, I = width: forward 3 e I (reads gate and up, writes y) and 2 e I for a kept
// row; backward 5 e I (reads dy, gate, up, writes dgate, dup) and e I where y is recomputed. The floor is those bytes
// over the copy bandwidth; about 15 instructions an element leave the arithmetic below it.

#include "../elementwise/swiglu.h"
#include "launch.cuh"

namespace lmf {
namespace LMF_ISA {
namespace {

constexpr int kPacks = 2;
constexpr int kThreads = 256, kBlocks = 4;  // of a block, and blocks of a multiprocessor: half of its threads

template <typename T>
struct SwigluTower {
  const T* dy;  // backward
  const T* gate_up;
  T* y;         // backward: null where it is not wanted
  T* dgate_up;  // backward
  T* kept;      // forward: a copy of the rows of gate_up from first_kept on; null: none
  int64_t num_rows, width, first_kept;
};

template <typename T>
struct SwigluTowers {
  SwigluTower<T> tower[2];
};

// Calls f(tower, row, column) for the packs of this thread; threadIdx.x and blockIdx.x run along a row.
template <typename T, int kCount, typename F>
__device__ __forceinline__ void for_each_pack(const SwigluTowers<T>& towers, const F& f) {
  const int64_t num_rows = towers.tower[0].num_rows, all_rows = num_rows + towers.tower[1].num_rows;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  const int first = (blockIdx.x * kPacks * blockDim.x + threadIdx.x) * kCount, pack_step = blockDim.x * kCount;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; i < all_rows; i += step) {
    // Members are selected one by one: indexing with a variable would put the arguments into local memory.
    SwigluTower<T> tower = towers.tower[0];
    if (i >= num_rows) tower = towers.tower[1];
    f(tower, i < num_rows ? i : i - num_rows, first, pack_step);
  }
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads, kBlocks) swiglu_kernel(const SwigluTowers<T> towers) {
  for_each_pack<T, kCount>(towers, [](const SwigluTower<T>& tower, int64_t row, int first, int step) {
    const T* gate_row = tower.gate_up + row * 2 * tower.width;
    Pack<T, kCount> gate[kPacks], up[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int j = first + p * step;
      if (j >= tower.width) continue;
      gate[p] = load<T, kCount>(gate_row + j);
      up[p] = load<T, kCount>(gate_row + tower.width + j);
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int j = first + p * step;
      if (j >= tower.width) continue;
      float g[kCount], u[kCount], y[kCount];
      unpack(gate[p], g);
      unpack(up[p], u);
#pragma unroll
      for (int i = 0; i < kCount; ++i) y[i] = swiglu_element(g[i], u[i]);
      store(tower.y + row * tower.width + j, pack_of<T, kCount>(y));
      if (tower.kept != nullptr && row >= tower.first_kept) {
        T* copy = tower.kept + (row - tower.first_kept) * 2 * tower.width;
        store(copy + j, gate[p]);
        store(copy + tower.width + j, up[p]);
      }
    }
  });
}

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads, kBlocks) swiglu_backward_kernel(const SwigluTowers<T> towers) {
  for_each_pack<T, kCount>(towers, [](const SwigluTower<T>& tower, int64_t row, int first, int step) {
    const T* gate_row = tower.gate_up + row * 2 * tower.width;
    Pack<T, kCount> grad[kPacks], gate[kPacks], up[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int j = first + p * step;
      if (j >= tower.width) continue;
      grad[p] = load<T, kCount>(tower.dy + row * tower.width + j);
      gate[p] = load<T, kCount>(gate_row + j);
      up[p] = load<T, kCount>(gate_row + tower.width + j);
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int j = first + p * step;
      if (j >= tower.width) continue;
      float dy[kCount], g[kCount], u[kCount], y[kCount];
      unpack(grad[p], dy);
      unpack(gate[p], g);
      unpack(up[p], u);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const SwigluGrad result = swiglu_backward_element(dy[i], g[i], u[i]);
        g[i] = result.gate;
        u[i] = result.up;
        y[i] = result.y;
      }
      T* dgate_row = tower.dgate_up + row * 2 * tower.width;
      store(dgate_row + j, pack_of<T, kCount>(g));
      store(dgate_row + tower.width + j, pack_of<T, kCount>(u));
      if (tower.y != nullptr) store(tower.y + row * tower.width + j, pack_of<T, kCount>(y));
    }
  });
}

template <typename T, int kCount>
void launch(const SwigluTowers<T>& towers, bool backward, const Gpu& gpu) {
  const int64_t num_rows = towers.tower[0].num_rows + towers.tower[1].num_rows;
  const int64_t packs = ceil_div(std::max(towers.tower[0].width, towers.tower[1].width), kCount);
  if (num_rows == 0 || packs == 0) return;
  const RowsGrid shape(packs, num_rows, kPacks, kThreads);
  if (backward) {
    LMF_LAUNCH((swiglu_backward_kernel<T, kCount>), shape.grid, shape.block, gpu.stream, towers);
  } else {
    LMF_LAUNCH((swiglu_kernel<T, kCount>), shape.grid, shape.block, gpu.stream, towers);
  }
}

template <typename T>
void choose_access(const SwigluTowers<T>& towers, bool backward, const Gpu& gpu) {
  bool aligned = true;
  for (const SwigluTower<T>& t : towers.tower) {
    aligned = aligned && is_aligned(t.width * sizeof(T), {t.dy, t.gate_up, t.y, t.dgate_up, t.kept});
  }
  aligned ? launch<T, kVector<T>>(towers, backward, gpu) : launch<T, 1>(towers, backward, gpu);
}

Tensors swiglu(const Tensors& gate_ups, int64_t num_constant, bool keep) {
  const SwigluTensors t(gate_ups, num_constant, keep);
  const Gpu gpu(t.gate_up[0]);
  with_gpu_element_type(t.gate_up[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for (size_t first = 0; first < t.gate_up.size(); first += 2) {
      SwigluTowers<T> towers = {};
      for (size_t i = first; i < std::min(first + 2, t.gate_up.size()); ++i) {
        SwigluTower<T>& tower = towers.tower[i - first];
        tower.gate_up = data<T>(t.gate_up[i]);
        tower.y = data<T>(t.y[i]);
        tower.kept = keep && i == 0 ? data<T>(t.kept[0]) : nullptr;
        tower.num_rows = t.y[i].size(0);
        tower.width = t.y[i].size(1);
        tower.first_kept = num_constant;
      }
      choose_access(towers, false, gpu);
    }
  });
  return t.results();
}

Tensors swiglu_backward(const Tensors& dys, const Tensors& gate_ups, bool recompute) {
  const SwigluBackwardTensors t(dys, gate_ups, recompute);
  const Gpu gpu(t.gate_up[0]);
  with_gpu_element_type(t.gate_up[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    for (size_t first = 0; first < t.gate_up.size(); first += 2) {
      SwigluTowers<T> towers = {};
      for (size_t i = first; i < std::min(first + 2, t.gate_up.size()); ++i) {
        SwigluTower<T>& tower = towers.tower[i - first];
        tower.dy = data<T>(t.dy[i]);
        tower.gate_up = data<T>(t.gate_up[i]);
        tower.y = recompute ? data<T>(t.y[i]) : nullptr;
        tower.dgate_up = data<T>(t.dgate_up[i]);
        tower.num_rows = t.dy[i].size(0);
        tower.width = t.dy[i].size(1);
      }
      choose_access(towers, true, gpu);
    }
  });
  return t.results();
}

}  // namespace
}  // namespace LMF_ISA
}  // namespace lmf

LMF_CUDA_LIBRARY_IMPL(m) {
  m.impl("swiglu", TORCH_BOX(&lmf::LMF_ISA::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&lmf::LMF_ISA::swiglu_backward));
}
