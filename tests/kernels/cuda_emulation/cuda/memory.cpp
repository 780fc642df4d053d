// Checks every load and store of a kernel. g++ -fsanitize=thread,alignment calls the functions at the end of this file
// before every access of device code; they replace the run-time library of g++. Errors are accesses
//
// - outside of a tensor, the kernel's arguments, shared memory and the thread's own stack;
// - at an address that the type's alignment does not allow (16 bytes for vectors);
// - to shared memory that this block has not written;
// - of two threads to one byte, one of them writing, with no barrier between them; or of two blocks of one launch;
// - by host code to a tensor's data, which on a GPU it cannot reach without a synchronisation.
//
// The tensors are known because their memory comes from the allocator in this file while the emulation is on.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <link.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "emulator.h"

namespace lmf_emulation {
namespace {

// The last accesses to a byte. Threads are indices in the block, epochs as in Position.
struct Byte {
  uint32_t write_epoch = 0, read_epoch = 0;
  uint16_t writer = 0, reader = 0;
  uint16_t write_warp_epoch = 0, read_warp_epoch = 0;
  bool many_readers = false, many_warps = false;
};

struct Region {
  uintptr_t begin = 0, end = 0;
  bool is_shared = false, is_writable = false;
  std::unique_ptr<Byte[]> bytes;

  bool holds(uintptr_t address, size_t size) const { return address >= begin && address + size <= end; }
};

struct Memory {
  std::mutex mutex;
  std::map<uintptr_t, Region> tensors;  // by first address
  std::vector<Region> statics;          // of this library: __shared__ variables and constants
  std::string host_error;
  Region* recent[4] = {};
  uint32_t next_recent = 0;

  Memory() {
    dl_iterate_phdr([](dl_phdr_info* info, size_t, void* self) {
      const auto here = reinterpret_cast<uintptr_t>(&builtins);
      std::vector<Region> found;
      bool is_this = false;
      for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& segment = info->dlpi_phdr[i];
        if (segment.p_type != PT_LOAD) continue;
        const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
        const bool is_writable = segment.p_flags & PF_W;
        found.push_back({begin, begin + segment.p_memsz, is_writable, is_writable, nullptr});
        is_this |= found.back().holds(here, 1);
      }
      if (is_this) static_cast<Memory*>(self)->statics = std::move(found);
      return static_cast<int>(is_this);
    }, this);
  }

  Region* find_tensor(uintptr_t address) {
    auto after = tensors.upper_bound(address);
    if (after == tensors.begin()) return nullptr;
    Region& region = std::prev(after)->second;
    return address < region.end ? &region : nullptr;
  }

  Region* find(uintptr_t address, size_t size) {
    for (Region* region : recent) {
      if (region && region->holds(address, size)) return region;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    Region* found = find_tensor(address);
    for (Region& region : statics) {
      if (!found && region.holds(address, size)) found = &region;
    }
    if (!found || !found->holds(address, size)) return nullptr;
    recent[next_recent++ % 4] = found;
    return found;
  }
};

// Never destroyed: tensors may outlive every other static variable.
Memory& memory() {
  static Memory* const instance = new Memory;
  return *instance;
}

class Allocator final : public c10::Allocator {
 public:
  static constexpr size_t kGap = 256;  // between tensors, so that no access runs from one into the next

  c10::DataPtr allocate(size_t size) override {
    if (size == 0) return {nullptr, nullptr, &release, c10::Device(c10::DeviceType::CPU)};
    void* whole = nullptr;
    if (posix_memalign(&whole, kGap, size + 2 * kGap) != 0) throw std::bad_alloc();
    char* data = static_cast<char*>(whole) + kGap;
    const auto begin = reinterpret_cast<uintptr_t>(data);
    const std::lock_guard<std::mutex> lock(memory().mutex);
    memory().tensors[begin] = {begin, begin + size, false, true, nullptr};
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t size) const override { memcpy(to, from, size); }

 private:
  static void release(void* data) {
    if (!data) return;
    {
      const std::lock_guard<std::mutex> lock(memory().mutex);
      memory().tensors.erase(reinterpret_cast<uintptr_t>(data));
      for (Region*& region : memory().recent) region = nullptr;
    }
    std::free(static_cast<char*>(data) - kGap);
  }
};

std::string describe(const char* verb, uintptr_t address, size_t size) {
  const Region* tensor = nullptr;
  {
    const std::lock_guard<std::mutex> lock(memory().mutex);
    tensor = memory().find_tensor(address);
    if (!tensor) {
      auto after = memory().tensors.upper_bound(address);
      if (after != memory().tensors.begin()) tensor = &std::prev(after)->second;
    }
  }
  std::string text = std::string(verb) + " of " + std::to_string(size) + " bytes";
  if (!tensor || address - tensor->begin > (tensor->end - tensor->begin) + Allocator::kGap) return text;
  return text + " at byte " + std::to_string(address - tensor->begin) + " of a tensor of " +
         std::to_string(tensor->end - tensor->begin) + " bytes";
}

// Describes the conflict with another thread that accesses this byte; null if there is none.
const char* conflict(Byte& byte, bool is_shared, bool is_write) {
  const Thread& thread = *position.thread;
  const uint32_t warp = thread.index / kWarpSize;
  if (is_shared) {
    if (!is_write && byte.write_epoch < position.block_epoch) return "shared memory that this block has not written";
  } else {
    const auto in_other_block = [](uint32_t epoch) {
      return epoch >= position.launch_epoch && epoch < position.block_epoch;
    };
    if (in_other_block(byte.write_epoch)) return "what another block of this launch writes";
    if (is_write && in_other_block(byte.read_epoch)) return "what another block of this launch reads";
  }
  if (byte.write_epoch == position.epoch && byte.writer != thread.index &&
      !(byte.writer / kWarpSize == warp && byte.write_warp_epoch < thread.warp_epoch)) {
    return "what another thread writes, with no barrier between";
  }
  const bool read_by_others = byte.read_epoch == position.epoch && (byte.many_readers || byte.reader != thread.index);
  if (is_write && read_by_others &&
      !(!byte.many_warps && byte.reader / kWarpSize == warp && byte.read_warp_epoch < thread.warp_epoch)) {
    return "what another thread reads, with no barrier between";
  }
  if (is_write) {
    byte.write_epoch = position.epoch;
    byte.writer = static_cast<uint16_t>(thread.index);
    byte.write_warp_epoch = static_cast<uint16_t>(thread.warp_epoch);
  } else {
    const bool again = byte.read_epoch == position.epoch;
    byte.many_readers = again && (byte.many_readers || byte.reader != thread.index);
    byte.many_warps = again && (byte.many_warps || byte.reader / kWarpSize != warp);
    byte.read_epoch = position.epoch;
    byte.reader = static_cast<uint16_t>(thread.index);
    byte.read_warp_epoch = static_cast<uint16_t>(thread.warp_epoch);
  }
  return nullptr;
}

bool is_busy = false;  // the containers used here may themselves be compiled with the calls below

void access_of_host(uintptr_t address, size_t size, const char* verb) {
  const std::lock_guard<std::mutex> lock(memory().mutex);
  if (memory().tensors.empty() || !memory().find_tensor(address) || !memory().host_error.empty()) return;
  memory().host_error = std::string("host code's ") + verb + " of " + std::to_string(size) +
                        " bytes of a tensor's data, which is the device's memory";
}

void access(const void* pointer, size_t size, bool is_write, bool is_aligned) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (is_busy || address - reinterpret_cast<uintptr_t>(&builtins) < sizeof(builtins)) return;
  const char* verb = is_write ? "store" : "load";
  if (!position.thread) {
    is_busy = true;
    access_of_host(address, size, verb);
    is_busy = false;
    return;
  }
  if (address - reinterpret_cast<uintptr_t>(position.thread->stack) < kStackSize) return;
  const Launch& launch = *position.launch;
  if (!is_write && address - reinterpret_cast<uintptr_t>(launch.call) + size <= launch.call_size) return;
  is_busy = true;
  std::string error;
  Region* region = memory().find(address, size);
  if (is_aligned && address % size != 0) {
    error = "misaligned " + describe(verb, address, size);
  } else if (!region || (is_write && !region->is_writable)) {
    error = "out of bounds: " + describe(verb, address, size);
  } else if (region->is_writable) {
    if (!region->bytes) region->bytes.reset(new Byte[region->end - region->begin]);
    Byte* bytes = region->bytes.get() + (address - region->begin);
    for (size_t i = 0; i < size && error.empty(); ++i) {
      const char* why = conflict(bytes[i], region->is_shared, is_write);
      if (why) error = std::string("race: ") + describe(verb, address, size) + ": " + why;
    }
  }
  is_busy = false;
  if (!error.empty()) fail(error);
}

}  // namespace

std::string take_host_error() {
  const std::lock_guard<std::mutex> lock(memory().mutex);
  return std::exchange(memory().host_error, std::string());
}

}  // namespace lmf_emulation

#define LMF_EXPORT extern "C" __attribute__((visibility("default")))

// From here on (on = 1) tensors on the CPU count as device memory; on = 0 gives torch its own allocator back.
LMF_EXPORT void lmf_emulation_switch(int on) {
  static lmf_emulation::Allocator ours;
  static c10::Allocator* const original = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? &ours : original, 1);
}

// The error of host code since the last call; "" if there is none. Valid until the next call.
LMF_EXPORT const char* lmf_emulation_host_error() {
  static std::string text;
  text = lmf_emulation::take_host_error();
  return text.c_str();
}

// ---- Functions that g++ calls ---------------------------------------------------------------------------------------

using lmf_emulation::access;

#define LMF_ACCESS(size)                                                                  \
  extern "C" void __tsan_read##size(void* p) { access(p, size, false, true); }            \
  extern "C" void __tsan_write##size(void* p) { access(p, size, true, true); }            \
  extern "C" void __tsan_unaligned_read##size(void* p) { access(p, size, false, false); } \
  extern "C" void __tsan_unaligned_write##size(void* p) { access(p, size, true, false); }
LMF_ACCESS(1)
LMF_ACCESS(2)
LMF_ACCESS(4)
LMF_ACCESS(8)
LMF_ACCESS(16)
extern "C" void __tsan_read_range(void* p, size_t size) { access(p, size, false, false); }
extern "C" void __tsan_write_range(void* p, size_t size) { access(p, size, true, false); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_read(void*) {}
extern "C" void __tsan_vptr_update(void*, void*) {}

// Only host code uses atomics (reference counts). Kernels have none, because results must not depend on an order.
#define LMF_ATOMIC(bits)                                                                                   \
  using atomic##bits = uint##bits##_t;                                                                     \
  extern "C" atomic##bits __tsan_atomic##bits##_load(const volatile atomic##bits* p, int) {                \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                           \
  }                                                                                                        \
  extern "C" void __tsan_atomic##bits##_store(volatile atomic##bits* p, atomic##bits v, int) {             \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                              \
  }                                                                                                        \
  extern "C" atomic##bits __tsan_atomic##bits##_exchange(volatile atomic##bits* p, atomic##bits v, int) {  \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                    \
  }                                                                                                        \
  extern "C" atomic##bits __tsan_atomic##bits##_fetch_add(volatile atomic##bits* p, atomic##bits v, int) { \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                     \
  }                                                                                                        \
  extern "C" atomic##bits __tsan_atomic##bits##_fetch_sub(volatile atomic##bits* p, atomic##bits v, int) { \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                     \
  }                                                                                                        \
  extern "C" bool __tsan_atomic##bits##_compare_exchange_strong(                                           \
      volatile atomic##bits* p, atomic##bits* expected, atomic##bits v, int, int) {                        \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);         \
  }
LMF_ATOMIC(8)
LMF_ATOMIC(32)
LMF_ATOMIC(64)

// The layout is that of g++'s and clang's libubsan.
struct TypeMismatch {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};

extern "C" void __ubsan_handle_type_mismatch_v1(const TypeMismatch* mismatch, uintptr_t address) {
  if (!lmf_emulation::position.thread) return;
  lmf_emulation::fail(
      "misaligned access: an address " + std::to_string(address % (1u << mismatch->log_alignment)) +
      " bytes off its type's alignment of " + std::to_string(1u << mismatch->log_alignment) + " (line " +
      std::to_string(mismatch->line) + ")");
}

extern "C" void __ubsan_handle_type_mismatch_v1_abort(const TypeMismatch* mismatch, uintptr_t address) {
  __ubsan_handle_type_mismatch_v1(mismatch, address);
}
