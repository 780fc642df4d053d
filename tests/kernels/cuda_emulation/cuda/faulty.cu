// Kernels that test the emulation itself: two correct ones, and one with each mistake. test_emulator.py calls them as
// torch.ops.lmfusion_toys_emulated.<name>(x, out).

#include <torch/csrc/stable/tensor.h>

namespace {

using torch::stable::Tensor;

constexpr int kThreads = 64;

// Each block sums kThreads elements.
__global__ void block_sum(const float* x, float* out) {
  __shared__ float partial[2];
  float sum = x[blockIdx.x * kThreads + threadIdx.x];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = partial[0] + partial[1];
}

// Each kind of shuffle, and a value that one lane of a warp writes and the others read after a __syncwarp.
__global__ void shuffles(const float* x, float* out) {
  __shared__ float first[2];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, all = 0xffffffffu;
  const float value = x[threadIdx.x];
  if (lane == 0) first[warp] = value;
  __syncwarp();
  const float up = __shfl_up_sync(all, value, 1), down = __shfl_down_sync(all, value, 1, 16);
  const float mixed = __shfl_sync(all, value, lane ^ 3), from_first = __shfl_sync(all, value, 0);
  out[blockIdx.x * kThreads + threadIdx.x] =
      mixed + 100 * (up - value) + 1000 * (down - value) + 10000 * (first[warp] == from_first);
}

__global__ void missing_barrier(const float* x, float* out) {
  __shared__ float partial[kThreads];
  partial[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = partial[kThreads - 1 - threadIdx.x];
}

__global__ void unordered_shared(const float* x, float* out) {
  __shared__ float value;
  if (threadIdx.x == 0) value = x[0];
  if (threadIdx.x == 0) out[0] = value;
  if (threadIdx.x == 40) out[1] = value;
}

__global__ void overwritten_shared(const float* x, float* out) {
  __shared__ float partial[kThreads];
  for (int i = 0; i < 2; ++i) {
    partial[threadIdx.x] = x[threadIdx.x] + i;
    __syncthreads();
    out[threadIdx.x] = partial[kThreads - 1 - threadIdx.x];  // a second barrier has to follow
  }
}

__global__ void divergent_barrier(const float* x, float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void two_barriers(const float* x, float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void divergent_shuffle(const float* x, float* out) {
  float value = x[threadIdx.x];
  if (threadIdx.x % 32 < 20) value += __shfl_xor_sync(0xffffffffu, value, 1);
  out[threadIdx.x] = value;
}

__global__ void shuffle_from_outside(const float* x, float* out) {
  float value = x[threadIdx.x];
  if (threadIdx.x < 16) value += __shfl_xor_sync(0x0000ffffu, value, 16);
  out[threadIdx.x] = value;
}

__global__ void store_out_of_bounds(const float* x, float* out) { out[threadIdx.x + 1] = x[threadIdx.x]; }

__global__ void load_out_of_bounds(const float* x, float* out) { out[threadIdx.x] = x[threadIdx.x - 1]; }

__global__ void misaligned_store(const float* x, float* out) {
  if (threadIdx.x < 8) *reinterpret_cast<float4*>(out + 1 + 4 * threadIdx.x) = {x[0], x[1], x[2], x[3]};
}

struct alignas(16) Halves {
  uint16_t v[8];
};

__global__ void misaligned_load(const float* x, float* out) {
  const Halves halves = *reinterpret_cast<const Halves*>(x + 2);
  out[threadIdx.x] = halves.v[threadIdx.x % 8];
}

__global__ void unwritten_shared(const float* x, float* out) {
  __shared__ float partial[kThreads];
  if (blockIdx.x == 0) partial[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = partial[threadIdx.x];
}

__global__ void blocks_in_order(const float* x, float* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = blockIdx.x == 0 ? x[0] : out[blockIdx.x - 1] + 1;
}

__global__ void blocks_at_one_place(const float* x, float* out) {
  if (threadIdx.x == 0) out[0] = x[blockIdx.x];
}

template <void (*kernel)(const float*, float*)>
void launch(const Tensor& x, const Tensor& out, const char* name, unsigned blocks, void* stream) {
  lmf_emulation::launch(
      name, kernel, dim3(blocks), dim3(kThreads), stream, static_cast<const float*>(x.const_data_ptr()),
      static_cast<float*>(out.mutable_data_ptr()));
}

#define LMF_TOY(name) \
  void run_##name(Tensor x, Tensor out) { launch<name>(x, out, #name, 2, lmf_emulation::current_stream()); }
LMF_TOY(block_sum)
LMF_TOY(shuffles)
LMF_TOY(missing_barrier)
LMF_TOY(unordered_shared)
LMF_TOY(overwritten_shared)
LMF_TOY(divergent_barrier)
LMF_TOY(two_barriers)
LMF_TOY(divergent_shuffle)
LMF_TOY(shuffle_from_outside)
LMF_TOY(store_out_of_bounds)
LMF_TOY(load_out_of_bounds)
LMF_TOY(misaligned_store)
LMF_TOY(misaligned_load)
LMF_TOY(unwritten_shared)
LMF_TOY(blocks_in_order)
LMF_TOY(blocks_at_one_place)

void run_default_stream(Tensor x, Tensor out) { launch<block_sum>(x, out, "default_stream", 2, nullptr); }
void run_empty_grid(Tensor x, Tensor out) {
  launch<block_sum>(x, out, "empty_grid", 0, lmf_emulation::current_stream());
}
void run_host_load(Tensor x, Tensor out) {
  const unsigned blocks = *static_cast<const float*>(x.const_data_ptr()) > 0 ? 1 : 2;
  launch<block_sum>(x, out, "host_load", blocks, lmf_emulation::current_stream());
}

}  // namespace

#define LMF_TOYS(f)                                                                                             \
  f(block_sum) f(shuffles) f(missing_barrier) f(unordered_shared) f(overwritten_shared) f(divergent_barrier)    \
      f(two_barriers) f(divergent_shuffle) f(shuffle_from_outside) f(store_out_of_bounds) f(load_out_of_bounds) \
          f(misaligned_store) f(misaligned_load) f(unwritten_shared) f(blocks_in_order) f(blocks_at_one_place)  \
              f(default_stream) f(empty_grid) f(host_load)

#define LMF_DEFINE(name) m.def(#name "(Tensor x, Tensor(a!) out) -> ()");
#define LMF_IMPLEMENT(name) m.impl(#name, TORCH_BOX(&run_##name));
STABLE_TORCH_LIBRARY(lmfusion_toys, m){LMF_TOYS(LMF_DEFINE)} STABLE_TORCH_LIBRARY_IMPL(lmfusion_toys, CUDA, m) {
  LMF_TOYS(LMF_IMPLEMENT)
}
