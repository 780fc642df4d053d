// The distribution of the heads of a row over threads, for RoPE on the GPU, forward and backward.
//
// `lanes` threads (a power of two) hold a head of D elements, each a pack of its first half and the pack of the second
// half that is rotated with it. A thread has kHeads neighbouring heads of one kind (query, key or value), so it reads
// the angles once for them and has 2 kHeads accesses in flight.

#pragma once

#include "../elementwise/rms_norm.h"
#include "../elementwise/rope.h"
#include "launch.cuh"

namespace lmf {
namespace LMF_ISA {

constexpr int kRopeThreads = 256;

struct Heads {
  int num_heads, num_kv_heads, half;  // half of a head's elements

  __device__ __forceinline__ int64_t q_width() const { return static_cast<int64_t>(num_heads) * 2 * half; }
  __device__ __forceinline__ int64_t kv_width() const { return static_cast<int64_t>(num_kv_heads) * 2 * half; }
  __device__ __forceinline__ int64_t width() const { return q_width() + 2 * kv_width(); }
};

inline Heads heads_of(int64_t num_heads, int64_t num_kv_heads, int64_t head_dim) {
  return {static_cast<int>(num_heads), static_cast<int>(num_kv_heads), static_cast<int>(head_dim / 2)};
}

enum HeadKind : int { kQuery, kKey, kValue, kNone };

// kHeads neighbouring heads of one kind, the group-th such set of a row.
template <int kHeads>
struct HeadGroup {
  HeadKind kind;
  int first, count;  // heads of that kind

  __device__ __forceinline__ HeadGroup(const Heads& heads, int group) {
    const int q_groups = (heads.num_heads + kHeads - 1) / kHeads;
    const int kv_groups = (heads.num_kv_heads + kHeads - 1) / kHeads;
    kind = group < q_groups ? kQuery : group < q_groups + kv_groups ? kKey : kValue;
    if (group >= q_groups + 2 * kv_groups) kind = kNone;
    first = (group - (kind == kQuery ? 0 : kind == kKey ? q_groups : q_groups + kv_groups)) * kHeads;
    const int all = kind == kQuery ? heads.num_heads : heads.num_kv_heads;
    count = kind == kNone ? 0 : all - first < kHeads ? all - first : kHeads;
  }

  // Where the group starts in a row of qkv.
  __device__ __forceinline__ int64_t offset(const Heads& heads) const {
    const int before = kind == kQuery ? 0 : kind == kKey ? heads.num_heads : heads.num_heads + heads.num_kv_heads;
    return static_cast<int64_t>(before + first) * 2 * heads.half;
  }
};

template <int kCount>
__device__ __forceinline__ void load_floats(const float* from, float (&to)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const Pack<float, 4> four = load<float, 4>(from + i);
    memcpy(&to[i], four.words, sizeof(four.words));
  }
}

// The grid: threadIdx.x are the lanes of a head, threadIdx.y and blockIdx.y groups of heads, threadIdx.z and blockIdx.x
// rows. Blocks are whole warps.
struct HeadsGrid {
  int64_t lanes = 1, block_groups, block_rows, grid_groups;

  HeadsGrid(const Heads& heads, int64_t count, int64_t heads_each) {
    while (lanes * count < heads.half) lanes *= 2;
    const int64_t groups = ceil_div(heads.num_heads, heads_each) + 2 * ceil_div(heads.num_kv_heads, heads_each);
    grid_groups = ceil_div(groups * lanes, kRopeThreads);
    block_groups = 1;
    const int64_t wanted = ceil_div(groups, grid_groups);
    while (block_groups < wanted && block_groups * lanes < kWarp) block_groups *= 2;
    if (block_groups < wanted) block_groups = round_up(wanted, block_groups);
    block_rows = std::max<int64_t>(1, kRopeThreads / 2 / (lanes * block_groups));
    // Whole warps: lanes and, below a warp, block_groups are powers of two, and so is what is missing.
    if (lanes * block_groups < kWarp) block_rows = round_up(block_rows, kWarp / (lanes * block_groups));
  }

  int64_t num_threads() const { return lanes * block_groups * block_rows; }
  dim3 block() const { return dim3(lanes, block_groups, block_rows); }
  dim3 grid(int64_t blocks) const { return dim3(blocks, grid_groups); }
};

// Whether the heads can be held in packs of `count` elements.
inline bool fits_packs(const Heads& heads, int64_t count) {
  return heads.half % count == 0 && heads.half / count <= kWarp;
}

}  // namespace LMF_ISA
}  // namespace lmf
