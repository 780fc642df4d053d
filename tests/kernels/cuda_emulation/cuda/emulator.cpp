// Schedules the threads of a grid and finds errors of control flow. Threads of a block are fibers that run until a
// barrier or a warp operation. A barrier or warp operation that not all threads reach is an error.

#include "emulator.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>

namespace lmf_emulation {

Builtins builtins;
Position position;
int64_t num_multiprocessors = 2;

namespace {

constexpr uint32_t kMaxThreads = 1024;
constexpr uint32_t kCanary = 0x5afe57ac;

std::mutex launch_mutex;
std::mt19937 random_order(0);
std::vector<Thread> threads;
std::vector<std::string> launched;
std::string error;
jmp_buf scheduler;
ucontext_t creator;

std::string text(Dim3 d) { return std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z); }

// A fiber is never destroyed: it runs its thread of one block, then of the next.
void fiber() {
  Thread* self = position.thread;
  for (;;) {
    position.launch->invoke(position.launch->call);
    self->state = Thread::kFinished;
    if (_setjmp(self->context) == 0) _longjmp(scheduler, 1);
  }
}

void allocate_threads() {
  threads.resize(kMaxThreads);
  for (uint32_t i = 0; i < kMaxThreads; ++i) {
    threads[i].index = i;
    void* stack = mmap(nullptr, kStackSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("no memory for the stacks of emulated threads");
    threads[i].stack = static_cast<char*>(stack);
    memcpy(threads[i].stack, &kCanary, sizeof(kCanary));
  }
}

// Lets `thread` run up to its next barrier, warp operation or end.
void resume(Thread& thread) {
  position.thread = &thread;
  builtins.thread_index = thread.position;
  if (_setjmp(scheduler) == 0) {
    if (thread.state == Thread::kFresh) {
      ucontext_t start;
      getcontext(&start);
      start.uc_stack.ss_sp = thread.stack;
      // Stacks that all begin at the same offset of a page would evict each other from the cache.
      start.uc_stack.ss_size = kStackSize - thread.index % 32 * 256;
      start.uc_link = nullptr;
      makecontext(&start, fiber, 0);
      swapcontext(&creator, &start);
    }
    _longjmp(thread.context, 1);
  }
  uint32_t canary;
  memcpy(&canary, thread.stack, sizeof(canary));
  if (canary != kCanary && error.empty()) error = "a thread's stack overflows" + where();
  position.thread = nullptr;
  if (!error.empty()) throw std::runtime_error(error);
}

void yield(Thread::State state) {
  Thread* self = position.thread;
  self->state = state;
  if (_setjmp(self->context) == 0) _longjmp(scheduler, 1);
  self->state = Thread::kReady;
}

[[noreturn]] void fail_at(const Thread& thread, const std::string& what) {
  builtins.thread_index = thread.position;
  throw std::runtime_error(what + where());
}

const char* describe(const Thread& thread) {
  return thread.state == Thread::kFinished ? "has ended" : "waits in another place";
}

// The lane that `lane` reads, by the rules of the PTX instruction shfl.sync.
uint32_t source_lane(const WarpCall& call, uint32_t lane) {
  const uint32_t first = lane / call.width * call.width, within = lane % call.width;
  switch (call.op) {
    case WarpOp::kIndex: return first + call.argument % call.width;
    case WarpOp::kXor: return (lane ^ call.argument) < first + call.width ? lane ^ call.argument : lane;
    case WarpOp::kUp: return within >= call.argument ? lane - call.argument : lane;
    case WarpOp::kDown: return within + call.argument < call.width ? lane + call.argument : lane;
    default: return lane;
  }
}

void finish_warp_call(Thread* lanes, const WarpCall& common) {
  unsigned char values[kWarpSize][sizeof(WarpCall::value)];
  for (uint32_t i = 0; i < kWarpSize; ++i) {
    if (!(common.mask >> i & 1)) continue;
    memcpy(values[i], lanes[i].call->value, sizeof(values[i]));
  }
  for (uint32_t i = 0; i < kWarpSize; ++i) {
    if (!(common.mask >> i & 1)) continue;
    WarpCall& call = *lanes[i].call;
    if (call.op == WarpOp::kSync) {
      ++lanes[i].warp_epoch;
    } else {
      const uint32_t source = source_lane(call, i);
      if (source >= kWarpSize || !(common.mask >> source & 1)) {
        fail_at(lanes[i], "a shuffle reads lane " + std::to_string(source) + ", which takes no part in it");
      }
      memcpy(call.value, values[source], sizeof(call.value));
    }
    lanes[i].call = nullptr;
    lanes[i].state = Thread::kReady;
  }
}

// Completes the warp operations that all their lanes have reached. Every thread is blocked when this is called.
void resolve_warp(uint32_t warp, uint32_t num_threads) {
  Thread* lanes = threads.data() + warp * kWarpSize;
  const uint32_t num_lanes = std::min(kWarpSize, num_threads - warp * kWarpSize);
  for (uint32_t lane = 0; lane < num_lanes; ++lane) {
    if (lanes[lane].state != Thread::kAtWarpCall) continue;
    const WarpCall call = *lanes[lane].call;
    const std::string name = "a warp operation (line " + std::to_string(call.line) + ")";
    if (!(call.mask >> lane & 1)) fail_at(lanes[lane], name + " has a mask without the lane that calls it");
    if (call.width == 0 || call.width > kWarpSize || (call.width & (call.width - 1))) {
      fail_at(lanes[lane], name + " has width " + std::to_string(call.width));
    }
    for (uint32_t other = 0; other < kWarpSize; ++other) {
      if (!(call.mask >> other & 1)) continue;
      const std::string who = name + " is divergent: its mask names lane " + std::to_string(other);
      if (other >= num_lanes) fail_at(lanes[lane], who + ", which the block does not have");
      const Thread& thread = lanes[other];
      const bool meets = thread.state == Thread::kAtWarpCall && thread.call->op == call.op &&
                         thread.call->mask == call.mask && thread.call->line == call.line &&
                         thread.call->value_size == call.value_size && thread.call->width == call.width;
      if (!meets) fail_at(lanes[lane], who + ", which " + describe(thread));
    }
    finish_warp_call(lanes, call);
  }
}

void run_block(uint32_t num_threads) {
  std::vector<uint32_t> order(num_threads);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random_order);
  for (uint32_t i = 0; i < num_threads; ++i) {
    if (threads[i].state != Thread::kFresh) threads[i].state = Thread::kReady;
    threads[i].warp_epoch = 0;
  }
  position.block_epoch = ++position.epoch;
  for (;;) {
    uint32_t num_finished = 0;
    bool any_ready = false;
    for (uint32_t i : order) {
      if (threads[i].state <= Thread::kReady) resume(threads[i]);
    }
    for (uint32_t warp = 0; warp * kWarpSize < num_threads; ++warp) resolve_warp(warp, num_threads);
    for (uint32_t i = 0; i < num_threads; ++i) {
      num_finished += threads[i].state == Thread::kFinished;
      any_ready |= threads[i].state == Thread::kReady;
    }
    if (any_ready) continue;
    if (num_finished == num_threads) return;
    const Thread& first =
        *std::find_if(threads.begin(), threads.end(), [](const Thread& t) { return t.state == Thread::kAtBarrier; });
    for (uint32_t i = 0; i < num_threads; ++i) {
      if (threads[i].state != Thread::kAtBarrier || threads[i].line != first.line || threads[i].file != first.file) {
        fail_at(
            threads[i], "__syncthreads (line " + std::to_string(first.line) + ") is divergent: this thread " +
                            describe(threads[i]));
      }
    }
    for (uint32_t i = 0; i < num_threads; ++i) threads[i].state = Thread::kReady;
    ++position.epoch;
  }
}

void check(const Launch& launch) {
  const Dim3 &grid = launch.grid, &block = launch.block;
  const auto refuse = [&](const std::string& what) {
    throw std::runtime_error(
        what + " (kernel " + launch.name + ", grid " + text(grid) + ", block " + text(block) + ")");
  };
  if (grid.count() == 0 || block.count() == 0) refuse("a launch of nothing is an invalid configuration");
  if (grid.x > 0x7fffffffu || grid.y > 0xffffu || grid.z > 0xffffu) refuse("the grid is larger than CUDA's limits");
  if (block.count() > kMaxThreads || block.z > 64) refuse("the block is larger than CUDA's limits");
  if (launch.stream != current_stream()) refuse("the launch is not on torch's current stream");
  const std::string host_error = take_host_error();
  if (!host_error.empty()) refuse(host_error);
}

}  // namespace

void* current_stream() { return &launch_mutex; }

std::string where() {
  if (!position.launch) return "";
  return std::string(" (kernel ") + position.launch->name + ", block " + text(builtins.block_index) + ", thread " +
         text(builtins.thread_index) + ")";
}

void fail(const std::string& what) {
  if (!position.thread) throw std::runtime_error(what);
  error = what + where();
  position.thread->state = Thread::kFinished;
  _longjmp(scheduler, 1);
}

void sync_threads(const char* file, int line) {
  position.thread->file = file;
  position.thread->line = line;
  yield(Thread::kAtBarrier);
}

void warp_call(WarpCall& call) {
  position.thread->call = &call;
  yield(Thread::kAtWarpCall);
}

void run(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  check(launch);
  if (threads.empty()) allocate_threads();
  launched.push_back(launch.name);
  error.clear();
  builtins.block_dim = launch.block;
  builtins.grid_dim = launch.grid;
  position.launch = &launch;
  position.launch_epoch = ++position.epoch;
  const Dim3& d = launch.block;
  for (uint32_t i = 0; i < d.count(); ++i) threads[i].position = Dim3(i % d.x, i / d.x % d.y, i / d.x / d.y);
  std::vector<uint64_t> blocks(launch.grid.count());
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  std::shuffle(blocks.begin(), blocks.end(), random_order);
  try {
    for (uint64_t i : blocks) {
      const uint64_t row = i / launch.grid.x;
      builtins.block_index = Dim3(
          static_cast<uint32_t>(i % launch.grid.x), static_cast<uint32_t>(row % launch.grid.y),
          static_cast<uint32_t>(row / launch.grid.y));
      run_block(static_cast<uint32_t>(launch.block.count()));
    }
  } catch (...) {
    for (Thread& thread : threads) thread.state = Thread::kFresh;  // the content of their stacks is no longer needed
    position.thread = nullptr;
    position.launch = nullptr;
    throw;
  }
  position.launch = nullptr;
}

}  // namespace lmf_emulation

#define LMF_EXPORT extern "C" __attribute__((visibility("default")))

// Sets the order of blocks and threads from here on.
LMF_EXPORT void lmf_emulation_seed(uint32_t seed) { lmf_emulation::random_order.seed(seed); }

LMF_EXPORT void lmf_emulation_set_num_multiprocessors(int64_t count) { lmf_emulation::num_multiprocessors = count; }

// Names of the kernels launched since the last call, one per line; valid until the next call.
LMF_EXPORT const char* lmf_emulation_launched() {
  static std::string names;
  names.clear();
  for (const std::string& name : lmf_emulation::launched) names += name + "\n";
  lmf_emulation::launched.clear();
  return names.c_str();
}
