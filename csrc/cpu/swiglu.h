// The CPU kernels of SwiGLU. gate_up and dgate_up are [num_rows, 2 width], y and dy [num_rows, width], all contiguous.
// Each call works on one thread.

#pragma once

#include <cstdint>

#include "../elementwise/scalar.h"
#include "isa.h"

LMF_DECLARE_KERNEL(void, swiglu_rows, (const float* gate_up, float* y, int64_t num_rows, int64_t width))
LMF_DECLARE_KERNEL(void, swiglu_rows, (const bfloat16* gate_up, bfloat16* y, int64_t num_rows, int64_t width))
// y may be null: it is not wanted.
LMF_DECLARE_KERNEL(
    void, swiglu_backward_rows,
    (const float* dy, const float* gate_up, float* dgate_up, float* y, int64_t num_rows, int64_t width))
LMF_DECLARE_KERNEL(
    void, swiglu_backward_rows,
    (const bfloat16* dy, const bfloat16* gate_up, bfloat16* dgate_up, bfloat16* y, int64_t num_rows, int64_t width))
