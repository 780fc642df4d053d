// Runs CUDA kernels on the CPU. Each thread of a block is a fiber; blocks run one after the other, in shuffled order.
// emulator.cpp schedules them, memory.cpp checks every load and store, and cuda_emulation.h is what a .cu file
// includes.

#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace lmf_emulation {

constexpr uint32_t kWarpSize = 32;

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
  constexpr Dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
  uint64_t count() const { return uint64_t{x} * y * z; }
};

// What a kernel reads as threadIdx, blockIdx, blockDim and gridDim.
struct Builtins {
  Dim3 thread_index, block_index, block_dim, grid_dim;
};
extern Builtins builtins;

struct Launch {
  const char* name;
  Dim3 grid, block;
  void* stream;
  const void* call;  // the kernel with its arguments
  size_t call_size;
  void (*invoke)(const void* call);
};

// Runs the whole grid. Throws std::runtime_error, which names the kernel, at the first error that a GPU may not report.
void run(const Launch& launch);

// The stream that the emulated torch calls current: a launch on any other is an error.
void* current_stream();

// Of the emulated GPU: ops may size their grids by it.
extern int64_t num_multiprocessors;

void sync_threads(const char* file, int line);

enum class WarpOp { kSync, kIndex, kXor, kUp, kDown };

struct WarpCall {
  WarpOp op;
  uint32_t mask;
  uint32_t argument = 0;  // lane, lane mask or delta
  uint32_t width = kWarpSize;
  int line = 0;
  uint32_t value_size = 0;
  alignas(16) unsigned char value[16] = {};  // in: of this lane; out: of the lane that is read
};

void warp_call(WarpCall& call);

// Stops the running kernel with this error; does not return when called from a kernel.
void fail(const std::string& what);

// ---- Between the scheduler and the memory checks --------------------------------------------------------------------

struct Thread {
  enum State { kFresh, kReady, kAtBarrier, kAtWarpCall, kFinished };
  State state = kFresh;
  jmp_buf context;
  char* stack = nullptr;
  WarpCall* call = nullptr;
  const char* file = nullptr;
  int line = 0;
  uint32_t index = 0;
  Dim3 position;
  uint32_t warp_epoch = 0;  // number of __syncwarp passed in this block
};

constexpr size_t kStackSize = 128 * 1024;

// Progress of the current launch. Epochs only grow, by one at every block and at every __syncthreads.
struct Position {
  Thread* thread = nullptr;  // null: host code runs
  const Launch* launch = nullptr;
  uint32_t launch_epoch = 0, block_epoch = 0, epoch = 0;
};
extern Position position;

// " (kernel rms_norm, block 3,0,0, thread 17,0,0)"
std::string where();

// Returns the error of host code since the last call, and clears it.
std::string take_host_error();

}  // namespace lmf_emulation
