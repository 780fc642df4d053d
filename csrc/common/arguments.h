// What does each op demand of its own arguments? Shared by the CPU and the CUDA implementations.

#pragma once

#include "checks.h"

namespace lmf {

using OptionalTensor = std::optional<Tensor>;

// ---- rms_norm -------------------------------------------------------------------------------------------------------

inline void check_norm_weights(const Tensors& x, const Tensor& text_weight, const Tensor& image_weight) {
  check_dtype(text_weight, x[0].scalar_type(), x[0], "text_weight");
  check_shape(text_weight, {x[0].size(1)}, "text_weight");
  check_dtype(image_weight, x[0].scalar_type(), x[0], "image_weight");
  check_shape(image_weight, {x.back().size(1)}, "image_weight");
}

inline void check_num_constant(int64_t num_constant, int64_t num_rows) {
  STD_TORCH_CHECK(
      num_constant >= 0 && num_constant <= num_rows, "num_constant is ", num_constant,
      ", outside of [0, num_text], with ", num_rows, " text rows");
}

// ---- swiglu ---------------------------------------------------------------------------------------------------------

// Half the width of gate_up: the feed-forward width.
inline int64_t check_gate_up(const Tensor& gate_up, const Tensor& beside) {
  check_dtype(gate_up, check_row_dtype(beside, "gate_up"), beside, "gate_up");
  STD_TORCH_CHECK(
      gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "gate_up has shape ", shape_of(gate_up),
      ", expected [rows, 2 I]: gate and up side by side");
  return gate_up.size(1) / 2;
}

// ---- rope_reorder ---------------------------------------------------------------------------------------------------

// The norms of query and key heads that are there.
struct Norms {
  Tensors held;
  int64_t at[4] = {-1, -1, -1, -1};  // text q, text k, image q, image k: place in `held`, -1 where there is none

  Norms(const OptionalTensor* const (&norms)[4], int64_t head_dim, const Tensor& beside) {
    static const char* const names[4] = {"text_q_norm", "text_k_norm", "image_q_norm", "image_k_norm"};
    for (int i = 0; i < 4; ++i) {
      if (!norms[i]->has_value()) continue;
      check_dtype(**norms[i], beside.scalar_type(), beside, names[i]);
      check_shape(**norms[i], {head_dim}, names[i]);
      at[i] = static_cast<int64_t>(held.size());
      held.push_back(as_contiguous(**norms[i]));
    }
  }

  bool has(int i) const { return at[i] >= 0; }

  template <typename T>
  const T* weight(int i) const {
    return has(i) ? data<T>(held[at[i]]) : nullptr;
  }
};

// The size of a head, from tables of angles that fit `num_rows` rows (-1: any number).
inline int64_t check_angles(const Tensor& cos, const Tensor& sin, int64_t num_rows, const Tensor& beside) {
  check_dtype(cos, ScalarType::Float, beside, "cos");
  check_dtype(sin, ScalarType::Float, beside, "sin");
  STD_TORCH_CHECK(
      cos.dim() == 2 && (num_rows < 0 || cos.size(0) == num_rows), "cos has shape ", shape_of(cos), ", expected [",
      num_rows < 0 ? std::string("N") : std::to_string(num_rows), ", D/2]");
  check_shape(sin, {cos.size(0), cos.size(1)}, "sin");
  return 2 * cos.size(1);
}

// The number of key-value heads in rows of qkv.
inline int64_t check_heads(const Tensors& qkv, int64_t num_heads, int64_t head_dim) {
  const int64_t width = qkv[0].size(1);
  const int64_t num_kv_heads = head_dim > 0 ? (width / head_dim - num_heads) / 2 : 0;
  STD_TORCH_CHECK(
      num_heads > 0 && num_kv_heads > 0 && (num_heads + 2 * num_kv_heads) * head_dim == width &&
          qkv.back().size(1) == width,
      "qkv has ", width, " and ", qkv.back().size(1), " columns, expected (H + 2 H_kv) D with H = ", num_heads,
      ", D = ", head_dim);
  return num_kv_heads;
}

// The number of slots of the caches. They are written in place, so they cannot be made contiguous first.
inline int64_t check_caches(
    const Tensor& k_cache, const Tensor& v_cache, int64_t num_kv_heads, int64_t head_dim, const Tensor& beside) {
  const int64_t num_slots = k_cache.dim() == 3 ? k_cache.size(0) : 0;
  for (const auto& [cache, name] : {std::pair(&k_cache, "k_cache"), std::pair(&v_cache, "v_cache")}) {
    check_dtype(*cache, beside.scalar_type(), beside, name);
    check_shape(*cache, {num_slots, num_kv_heads, head_dim}, name);
    STD_TORCH_CHECK(cache->is_contiguous(), name, " is not contiguous, but it is written in place");
  }
  return num_slots;
}

// The arguments of rope_reorder_backward. Returns the size of a head.
inline int64_t check_rope_backward(
    const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensors& qkv, const Tensor& cos, const Tensor& sin,
    bool has_active_key, int64_t num_live, int64_t num_heads) {
  STD_TORCH_CHECK(
      dq.dim() == 3 && dk.dim() == 3, "dq, dk have shapes ", shape_of(dq), ", ", shape_of(dk),
      ", expected [A, H, D], [A, H_kv, D]");
  const ScalarType dtype = check_row_dtype(dq, "dq");
  const int64_t num_rows = dq.size(0), num_kv_heads = dk.size(1);
  const int64_t head_dim = check_angles(cos, sin, has_active_key ? -1 : num_rows, dq);
  check_shape(dq, {num_rows, num_heads, head_dim}, "dq");
  for (const auto& [t, name] : {std::pair(&dk, "dk"), std::pair(&dv, "dv")}) {
    check_dtype(*t, dtype, dq, name);
    check_shape(*t, {num_rows, num_kv_heads, head_dim}, name);
  }
  STD_TORCH_CHECK(num_live >= 0 && num_live <= num_rows, "num_live is ", num_live, ", outside of [0, ", num_rows, "]");
  if (qkv.empty()) return head_dim;
  STD_TORCH_CHECK(
      check_rows(qkv, num_live, "qkv") == num_rows, "qkv does not have ", num_rows, " rows, one for each of dq");
  for (const Tensor& t : qkv) {
    check_dtype(t, dtype, dq, "qkv");
    check_shape(t, {t.size(0), (num_heads + 2 * num_kv_heads) * head_dim}, "qkv");
  }
  return head_dim;
}

// ---- reorder_rows ---------------------------------------------------------------------------------------------------

inline void check_reorder(const Tensor& x, const Tensor& inverse) {
  STD_TORCH_CHECK(x.dim() > 0, "x is a scalar, expected rows [N, ...]");
  check_dtype(inverse, ScalarType::Int, x, "inverse");
  check_shape(inverse, {x.size(0)}, "inverse");
}

}  // namespace lmf
