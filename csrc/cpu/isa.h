// Chooses the instruction set of CPU kernels at run time. The kernels of csrc/cpu are compiled once per instruction
// set, each time into a namespace of its own, and calls go to the best one that the processor has.
//
//   swiglu.h           LMF_DECLARE_KERNEL(void, swiglu_rows, (const float* gate_up, float* y, int64_t num_rows))
//   swiglu_kernel.cpp  namespace lmf::LMF_ISA { void swiglu_rows(...) { ... } }    compiled with -DLMF_ISA=<name>
//   swiglu_op.cpp      LMF_CALL_KERNEL(swiglu_rows, gate_up, y, num_rows);         overloads are fine
//
// Code in headers that kernels include (csrc/elementwise) must be in namespace lmf::LMF_ISA too. An inline function or
// template outside of it would exist once per instruction set under one name, and the linker would keep only one of
// them, perhaps one that the processor cannot run. The build lists baseline objects first, so that what remains (the
// standard library's templates) resolves to baseline code.

#pragma once

#include <cstdlib>
#include <cstring>

#ifndef LMF_ISA  // files that are compiled once
#define LMF_ISA baseline
#endif

// clang-format off: one line per instruction set
#if defined(__x86_64__)
#define LMF_DECLARE_KERNEL(result, name, parameters) \
  namespace lmf::baseline { result name parameters; }  \
  namespace lmf::avx2 { result name parameters; }      \
  namespace lmf::avx512 { result name parameters; }

// Calls the kernel `name` for the best instruction set.
#define LMF_CALL_KERNEL(name, ...)                                              \
  (::lmf::best_isa() == ::lmf::Isa::kAvx512 ? ::lmf::avx512::name(__VA_ARGS__)  \
   : ::lmf::best_isa() == ::lmf::Isa::kAvx2 ? ::lmf::avx2::name(__VA_ARGS__)    \
                                            : ::lmf::baseline::name(__VA_ARGS__))
#else
#define LMF_DECLARE_KERNEL(result, name, parameters) \
  namespace lmf::baseline { result name parameters; }
#define LMF_CALL_KERNEL(name, ...) ::lmf::baseline::name(__VA_ARGS__)
#endif
// clang-format on

namespace lmf {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// LMFUSION_CPU_ISA=baseline or avx2 limits the choice, for tests and to compare the versions of a kernel.
inline Isa detect_isa() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("LMFUSION_CPU_ISA");
  const bool only_baseline = wanted != nullptr && std::strcmp(wanted, "baseline") == 0;
  const bool only_avx2 = wanted != nullptr && std::strcmp(wanted, "avx2") == 0;
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (only_baseline || !has_avx2) return Isa::kBaseline;
  if (only_avx2 || !has_avx512) return Isa::kAvx2;
  return Isa::kAvx512;
#else
  return Isa::kBaseline;
#endif
}

inline Isa best_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

}  // namespace lmf
