// Checks of single arguments (device, dtype, shape, indices), and access to the rows of two towers.
//
// The Python wrappers check more, with longer messages; these checks protect direct callers of torch.ops.lmfusion. The
// dispatcher calls a CUDA op as soon as one argument is on a GPU, so arguments on one device are on the op's device.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../elementwise/scalar.h"

namespace lmf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

// Whether `t` is where the kernels of csrc/cuda work: on a GPU, or anywhere in the tests that run them on the CPU.
inline bool is_on_gpu(const Tensor& t) {
#ifdef LMF_CUDA_EMULATION
  (void)t;
  return true;
#else
  return t.is_cuda();
#endif
}

inline void check_device(const Tensor& t, const Tensor& beside, const char* name) {
  STD_TORCH_CHECK(
      t.device() == beside.device(), name,
      " must be on the device of the other arguments; move all of them to the CPU, or all to one GPU");
}

inline void check_dtype(const Tensor& t, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(
      t.scalar_type() == dtype, name, " must have dtype ", torch::headeronly::toString(dtype), ", got ",
      torch::headeronly::toString(t.scalar_type()));
}

inline void check_dtype(const Tensor& t, ScalarType dtype, const Tensor& beside, const char* name) {
  check_device(t, beside, name);
  check_dtype(t, dtype, name);
}

// Returns the dtype of rows, which must be one that the kernels can work on.
inline ScalarType check_row_dtype(const Tensor& t, const char* name) {
  const ScalarType dtype = t.scalar_type();
  const bool is_known = dtype == ScalarType::Float || dtype == ScalarType::BFloat16;
  STD_TORCH_CHECK(
      is_known || (dtype == ScalarType::Half && is_on_gpu(t)), name,
      " must be float32 or bfloat16 (on a GPU also float16), got ", torch::headeronly::toString(dtype));
  return dtype;
}

inline void check_shape(const Tensor& t, const std::vector<int64_t>& shape, const char* name) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = t.size(i) == shape[i];
  std::string expected;
  for (size_t i = 0; i < shape.size(); ++i) expected += (i ? ", " : "") + std::to_string(shape[i]);
  STD_TORCH_CHECK(same, name, " must have shape [", expected, "], got ", shape_of(t));
}

// Returns an int32 vector of `size` indices below `limit`, contiguous. Only on the CPU are the indices checked: to read
// them from a GPU would make the host wait.
inline Tensor check_index(const Tensor& t, int64_t size, int64_t limit, const Tensor& beside, const char* name) {
  check_dtype(t, ScalarType::Int, beside, name);
  check_shape(t, {size}, name);
  Tensor index = torch::stable::contiguous(t);
  if (is_on_gpu(index)) return index;
  const int32_t* data = index.const_data_ptr<int32_t>();
  int32_t low = 0, high = -1;
  for (int64_t i = 0; i < size; ++i) {
    low = std::min(low, data[i]);
    high = std::max(high, data[i]);
  }
  STD_TORCH_CHECK(low >= 0 && high < limit, name, " must hold indices in [0, ", limit, "), got ", low < 0 ? low : high);
  return index;
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensors as_contiguous(const Tensors& tensors) {
  Tensors result;
  for (const Tensor& t : tensors) result.push_back(as_contiguous(t));
  return result;
}

// Checks that `x` holds rows of both towers: one tensor [N, d], or one tensor per tower, of one dtype. Returns N.
inline int64_t check_rows(const Tensors& x, int64_t num_text, const char* name) {
  STD_TORCH_CHECK(x.size() == 1 || x.size() == 2, name, " must hold 1 or 2 tensors, got ", x.size());
  const ScalarType dtype = check_row_dtype(x[0], name);
  int64_t num_rows = 0;
  for (const Tensor& t : x) {
    check_dtype(t, dtype, x[0], name);
    STD_TORCH_CHECK(t.dim() == 2, name, " must have shape [rows, width], got ", shape_of(t));
    num_rows += t.size(0);
  }
  STD_TORCH_CHECK(
      num_text >= 0 && (x.size() == 1 ? num_text <= num_rows : num_text == x[0].size(0)), "num_text must be ",
      x.size() == 1 ? "in 0 to " : "", x[0].size(0), ", the rows of the first tensor of ", name, ", got ", num_text);
  return num_rows;
}

inline void check_like(const Tensors& tensors, const Tensors& like, const char* name) {
  STD_TORCH_CHECK(tensors.size() == like.size(), name, " must hold ", like.size(), " tensors, got ", tensors.size());
  for (size_t i = 0; i < like.size(); ++i) {
    check_dtype(tensors[i], like[i].scalar_type(), like[0], name);
    check_shape(tensors[i], {like[i].size(0), like[i].size(1)}, name);
  }
}

// The element type behind a tensor: float, or the kernels' own bfloat16.
template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls f(T{}) with the element type T of `dtype`.
template <typename F>
void with_element_type(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) {
    f(float{});
  } else {
    f(bfloat16{});
  }
}

// The two towers' rows, whether one tensor holds them or two. Index 0 is the text tower, 1 the image tower.
template <typename T>
struct Towers {
  T* rows[2] = {nullptr, nullptr};
  int64_t num_rows[2] = {0, 0};
  int64_t width[2] = {0, 0};

  // Row i of a tower, or null where there are no rows at all (an optional argument left out).
  T* row(int tower, int64_t i) const { return rows[tower] ? rows[tower] + i * width[tower] : nullptr; }
};

template <typename T>
Towers<T> towers_of(const Tensors& x, int64_t num_text) {
  Towers<T> towers;
  if (x.empty()) return towers;
  const Tensor& last = x.back();
  towers.width[0] = x[0].size(1);
  towers.width[1] = last.size(1);
  towers.num_rows[0] = num_text;
  towers.num_rows[1] = x.size() == 1 ? last.size(0) - num_text : last.size(0);
  towers.rows[0] = data<T>(x[0]);
  towers.rows[1] = data<T>(last) + (x.size() == 1 ? num_text * towers.width[0] : 0);
  return towers;
}

}  // namespace lmf
