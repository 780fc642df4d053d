// Checks the arguments of each op and prepares its tensors. Shared by the CPU and the CUDA implementations.
//
// A struct ...Tensors holds what an implementation works on: the arguments, checked and contiguous, and the results,
// allocated but not yet filled.

#pragma once

#include "allocate.h"
#include "checks.h"

namespace lmf {

using OptionalTensor = std::optional<Tensor>;

inline void check_num_constant(int64_t num_constant, int64_t num_text) {
  STD_TORCH_CHECK(
      num_constant >= 0 && num_constant <= num_text, "num_constant must be in [0, num_text] = [0, ", num_text,
      "], got ", num_constant);
}

// ---- rms_norm -------------------------------------------------------------------------------------------------------

inline void check_norm_weights(const Tensors& x, const Tensor& text_weight, const Tensor& image_weight) {
  check_dtype(text_weight, x[0].scalar_type(), x[0], "text_weight");
  check_shape(text_weight, {x[0].size(1)}, "text_weight");
  check_dtype(image_weight, x[0].scalar_type(), x[0], "image_weight");
  check_shape(image_weight, {x.back().size(1)}, "image_weight");
}

struct RmsNormTensors {
  int64_t num_rows;
  Tensors x, residual;  // residual: empty if there is none
  Tensor weights[2];
  Tensors y, sum;  // sum: x + residual
  Tensor rstd;
  Tensors kept;           // copies of rows of what is normalised, by tower
  bool is_kept[2];        // whether `kept` has a tower's rows
  int64_t first_kept[2];  // the first of these rows within the tower

  RmsNormTensors(
      const Tensors& x_in, const Tensors& residual_in, const Tensor& text_weight, const Tensor& image_weight,
      int64_t num_text, int64_t num_constant, bool keep_text, bool keep_image) {
    num_rows = check_rows(x_in, num_text, "x");
    check_num_constant(num_constant, num_text);
    check_norm_weights(x_in, text_weight, image_weight);
    if (!residual_in.empty()) check_like(residual_in, x_in, "residual");
    x = as_contiguous(x_in), residual = as_contiguous(residual_in);
    weights[0] = as_contiguous(text_weight), weights[1] = as_contiguous(image_weight);
    y = allocate_like(x), sum = allocate_like(residual);
    const ScalarType dtype = x[0].scalar_type();
    rstd = allocate({num_rows}, ScalarType::Float, x[0]);
    is_kept[0] = keep_text, is_kept[1] = keep_image;
    first_kept[0] = num_constant, first_kept[1] = 0;
    if (keep_text) kept.push_back(allocate({num_text - num_constant, x[0].size(1)}, dtype, x[0]));
    if (keep_image) kept.push_back(allocate({num_rows - num_text, x.back().size(1)}, dtype, x[0]));
  }

  // Where the kept rows of a tower go, or null.
  template <typename T>
  T* kept_rows(int tower) const {
    return is_kept[tower] ? data<T>(tower == 0 ? kept[0] : kept.back()) : nullptr;
  }

  Tensors results() const {
    Tensors all = y;
    append(all, sum);
    append(all, kept);
    all.push_back(rstd);
    return all;
  }
};

struct RmsNormBackwardTensors {
  int64_t num_rows;
  Tensors dy, x, dresidual;  // dresidual: empty if there is none
  Tensor weights[2], rstd;
  bool weight_grad[2];
  Tensors dx, y;     // y: the forward's result, empty unless it is computed again
  Tensors dweights;  // of the weights that need a gradient

  RmsNormBackwardTensors(
      const Tensors& dy_in, const Tensors& x_in, const Tensor& rstd_in, const Tensor& text_weight,
      const Tensor& image_weight, int64_t num_text, const Tensors& dresidual_in, bool text_grad, bool image_grad,
      bool recompute) {
    num_rows = check_rows(x_in, num_text, "x");
    check_norm_weights(x_in, text_weight, image_weight);
    check_like(dy_in, x_in, "dy");
    if (!dresidual_in.empty()) check_like(dresidual_in, x_in, "dresidual");
    check_dtype(rstd_in, ScalarType::Float, x_in[0], "rstd");
    check_shape(rstd_in, {num_rows}, "rstd");
    dy = as_contiguous(dy_in), x = as_contiguous(x_in), dresidual = as_contiguous(dresidual_in);
    weights[0] = as_contiguous(text_weight), weights[1] = as_contiguous(image_weight), rstd = as_contiguous(rstd_in);
    weight_grad[0] = text_grad, weight_grad[1] = image_grad;
    dx = allocate_like(x);
    if (recompute) y = allocate_like(x);
    for (int tower : {0, 1}) {
      const int64_t width = (tower == 0 ? x[0] : x.back()).size(1);
      if (weight_grad[tower]) dweights.push_back(allocate({width}, x[0].scalar_type(), x[0]));
    }
  }

  // The gradient of a tower's weight, which must be wanted.
  template <typename T>
  T* dweight(int tower) const {
    return data<T>(tower == 0 ? dweights[0] : dweights.back());
  }

  Tensors results() const {
    Tensors all = dx;
    append(all, dweights);
    append(all, y);
    return all;
  }
};

// ---- swiglu ---------------------------------------------------------------------------------------------------------

// Returns half the width of gate_up: the feed-forward width.
inline int64_t check_gate_up(const Tensor& gate_up, const Tensor& beside) {
  check_dtype(gate_up, check_row_dtype(beside, "gate_up"), beside, "gate_up");
  STD_TORCH_CHECK(
      gate_up.dim() == 2 && gate_up.size(1) % 2 == 0,
      "gate_up must have shape [rows, 2 I], gate and up side by side, got ", shape_of(gate_up));
  return gate_up.size(1) / 2;
}

struct SwigluTensors {
  Tensors gate_up, y;
  Tensors kept;  // one copy of the rows of gate_up[0] from num_constant on, or nothing

  SwigluTensors(const Tensors& gate_up_in, int64_t num_constant, bool keep) {
    for (const Tensor& t : gate_up_in) {
      const int64_t width = check_gate_up(t, gate_up_in[0]);
      gate_up.push_back(as_contiguous(t));
      y.push_back(allocate({t.size(0), width}, t.scalar_type(), t));
    }
    if (!keep) return;
    const Tensor& first = gate_up[0];
    check_num_constant(num_constant, first.size(0));
    kept.push_back(allocate({first.size(0) - num_constant, first.size(1)}, first.scalar_type(), first));
  }

  Tensors results() const {
    Tensors all = y;
    append(all, kept);
    return all;
  }
};

struct SwigluBackwardTensors {
  Tensors dy, gate_up, dgate_up;
  Tensors y;  // the forward's result, empty unless it is computed again

  SwigluBackwardTensors(const Tensors& dy_in, const Tensors& gate_up_in, bool recompute) {
    STD_TORCH_CHECK(
        dy_in.size() == gate_up_in.size(), "dy must hold as many tensors as gate_up, ", gate_up_in.size(), ", got ",
        dy_in.size());
    for (size_t i = 0; i < gate_up_in.size(); ++i) {
      const int64_t width = check_gate_up(gate_up_in[i], gate_up_in[0]);
      check_dtype(dy_in[i], gate_up_in[i].scalar_type(), gate_up_in[0], "dy");
      check_shape(dy_in[i], {gate_up_in[i].size(0), width}, "dy");
    }
    dy = as_contiguous(dy_in), gate_up = as_contiguous(gate_up_in);
    dgate_up = allocate_like(gate_up);
    if (recompute) y = allocate_like(dy);
  }

  Tensors results() const {
    Tensors all = dgate_up;
    append(all, y);
    return all;
  }
};

// ---- rope_reorder ---------------------------------------------------------------------------------------------------

// The weights of the norms of query and key heads; each of the four may be missing.
struct QkNorms {
  Tensors weights;
  int64_t at[4] = {-1, -1, -1, -1};  // text q, text k, image q, image k: index in `weights`, -1 if missing

  QkNorms(const OptionalTensor* const (&norms)[4], int64_t head_dim, const Tensor& beside) {
    static const char* const names[4] = {"text_q_norm", "text_k_norm", "image_q_norm", "image_k_norm"};
    for (int i = 0; i < 4; ++i) {
      if (!norms[i]->has_value()) continue;
      check_dtype(**norms[i], beside.scalar_type(), beside, names[i]);
      check_shape(**norms[i], {head_dim}, names[i]);
      at[i] = static_cast<int64_t>(weights.size());
      weights.push_back(as_contiguous(**norms[i]));
    }
  }

  bool has(int i) const { return at[i] >= 0; }
  bool has_any() const { return !weights.empty(); }

  template <typename T>
  const T* weight(int i) const {
    return has(i) ? data<T>(weights[at[i]]) : nullptr;
  }
};

// Checks tables of angles for `num_rows` rows (-1: any number). Returns the size of a head.
inline int64_t check_angles(const Tensor& cos, const Tensor& sin, int64_t num_rows, const Tensor& beside) {
  check_dtype(cos, ScalarType::Float, beside, "cos");
  check_dtype(sin, ScalarType::Float, beside, "sin");
  STD_TORCH_CHECK(
      cos.dim() == 2 && (num_rows < 0 || cos.size(0) == num_rows), "cos must have shape [",
      num_rows < 0 ? std::string("N") : std::to_string(num_rows), ", D/2], got ", shape_of(cos));
  check_shape(sin, {cos.size(0), cos.size(1)}, "sin");
  return 2 * cos.size(1);
}

// Returns the number of key-value heads in rows of qkv.
inline int64_t check_heads(const Tensors& qkv, int64_t num_heads, int64_t head_dim) {
  const int64_t width = qkv[0].size(1);
  const int64_t num_kv_heads = head_dim > 0 ? (width / head_dim - num_heads) / 2 : 0;
  STD_TORCH_CHECK(
      num_heads > 0 && num_kv_heads > 0 && (num_heads + 2 * num_kv_heads) * head_dim == width &&
          qkv.back().size(1) == width,
      "qkv must have (H + 2 H_kv) D columns in both towers, with H = ", num_heads, " and D = ", head_dim, ", got ",
      width, " and ", qkv.back().size(1));
  return num_kv_heads;
}

// Returns the number of slots of the caches. They are written in place, so they cannot be made contiguous first.
inline int64_t check_caches(
    const Tensor& k_cache, const Tensor& v_cache, int64_t num_kv_heads, int64_t head_dim, const Tensor& beside) {
  const int64_t num_slots = k_cache.dim() == 3 ? k_cache.size(0) : 0;
  for (const auto& [cache, name] : {std::pair(&k_cache, "k_cache"), std::pair(&v_cache, "v_cache")}) {
    check_dtype(*cache, beside.scalar_type(), beside, name);
    check_shape(*cache, {num_slots, num_kv_heads, head_dim}, name);
    STD_TORCH_CHECK(cache->is_contiguous(), name, " must be contiguous, because it is written in place");
  }
  return num_slots;
}

// What rope_reorder and rope_reorder_cached have in common.
struct RopeReorderTensors {
  int64_t num_rows, num_heads, num_kv_heads, head_dim;
  Tensors qkv;
  Tensor cos, sin;
  Tensor sequence_row;  // by row: its sequence index
  QkNorms norms;

  RopeReorderTensors(
      const Tensors& qkv_in, const Tensor& cos_in, const Tensor& sin_in, const Tensor& tower_to_sequence,
      int64_t num_text, int64_t num_heads, const OptionalTensor* const (&norms_in)[4])
      : num_rows(check_rows(qkv_in, num_text, "qkv")),
        num_heads(num_heads),
        num_kv_heads(0),
        head_dim(check_angles(cos_in, sin_in, num_rows, qkv_in[0])),
        norms(norms_in, head_dim, qkv_in[0]) {
    num_kv_heads = check_heads(qkv_in, num_heads, head_dim);
    sequence_row = check_index(tower_to_sequence, num_rows, num_rows, qkv_in[0], "tower_to_sequence");
    qkv = as_contiguous(qkv_in), cos = as_contiguous(cos_in), sin = as_contiguous(sin_in);
  }

  ScalarType dtype() const { return qkv[0].scalar_type(); }
  Tensor allocate_heads(int64_t rows, int64_t heads) const {
    return allocate({rows, heads, head_dim}, dtype(), qkv[0]);
  }
};

// The results of rope_reorder.
struct RopeReorderResults {
  Tensor q_constant, q, k, v;

  RopeReorderResults(const RopeReorderTensors& t, int64_t num_constant)
      : q_constant(t.allocate_heads(num_constant, t.num_heads)),
        q(t.allocate_heads(t.num_rows - num_constant, t.num_heads)),
        k(t.allocate_heads(t.num_rows, t.num_kv_heads)),
        v(t.allocate_heads(t.num_rows, t.num_kv_heads)) {}
};

struct RopeReorderBackwardTensors {
  int64_t num_rows, num_kv_heads, head_dim;
  ScalarType dtype;
  Tensor dq, dk, dv;
  Tensors qkv;  // empty without norms
  Tensor cos, sin, active_row;
  OptionalTensor active_key;
  QkNorms norms;
  bool norm_grad[4];  // whether a norm is there and its gradient wanted
  Tensors dqkv;       // one tensor if joined, else two
  Tensors dnorms;     // the wanted gradients of norms, in order

  RopeReorderBackwardTensors(
      const Tensor& dq_in, const Tensor& dk_in, const Tensor& dv_in, const Tensors& qkv_in, const Tensor& cos_in,
      const Tensor& sin_in, const Tensor& active_row_in, const OptionalTensor& active_key_in, int64_t num_live,
      int64_t num_heads, const OptionalTensor* const (&norms_in)[4], bool text_norm_grad, bool image_norm_grad,
      bool joined)
      : head_dim(check(dq_in, dk_in, dv_in, qkv_in, cos_in, sin_in, active_key_in.has_value(), num_live, num_heads)),
        norms(norms_in, head_dim, dq_in) {
    num_rows = dq_in.size(0), num_kv_heads = dk_in.size(1);
    dtype = dq_in.scalar_type();
    STD_TORCH_CHECK(
        !norms.has_any() || !qkv_in.empty(), "qkv must not be empty, because the backward of QK norm reads it");
    active_row = check_index(active_row_in, num_rows, num_rows, dq_in, "active_row");
    if (active_key_in) active_key = check_index(*active_key_in, num_rows, cos_in.size(0), dq_in, "active_key");
    dq = as_contiguous(dq_in), dk = as_contiguous(dk_in), dv = as_contiguous(dv_in);
    cos = as_contiguous(cos_in), sin = as_contiguous(sin_in);
    qkv = as_contiguous(qkv_in);
    const int64_t width = (num_heads + 2 * num_kv_heads) * head_dim;
    if (joined) {
      dqkv.push_back(allocate({num_rows, width}, dtype, dq));
    } else {
      dqkv.push_back(allocate({num_live, width}, dtype, dq));
      dqkv.push_back(allocate({num_rows - num_live, width}, dtype, dq));
    }
    for (int i = 0; i < 4; ++i) {
      norm_grad[i] = norms.has(i) && (i < 2 ? text_norm_grad : image_norm_grad);
      if (norm_grad[i]) dnorms.push_back(allocate({head_dim}, dtype, dq));
    }
  }

  Tensors results() const {
    Tensors all = dqkv;
    append(all, dnorms);
    return all;
  }

 private:
  // Returns the size of a head.
  static int64_t check(
      const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensors& qkv, const Tensor& cos, const Tensor& sin,
      bool has_active_key, int64_t num_live, int64_t num_heads) {
    STD_TORCH_CHECK(
        dq.dim() == 3 && dk.dim() == 3, "dq and dk must have shapes [A, H, D] and [A, H_kv, D], got ", shape_of(dq),
        " and ", shape_of(dk));
    const ScalarType dtype = check_row_dtype(dq, "dq");
    const int64_t num_rows = dq.size(0), num_kv_heads = dk.size(1);
    const int64_t head_dim = check_angles(cos, sin, has_active_key ? -1 : num_rows, dq);
    check_shape(dq, {num_rows, num_heads, head_dim}, "dq");
    for (const auto& [t, name] : {std::pair(&dk, "dk"), std::pair(&dv, "dv")}) {
      check_dtype(*t, dtype, dq, name);
      check_shape(*t, {num_rows, num_kv_heads, head_dim}, name);
    }
    STD_TORCH_CHECK(
        num_live >= 0 && num_live <= num_rows, "num_live must be in [0, ", num_rows, "], the rows of dq, got ",
        num_live);
    if (qkv.empty()) return head_dim;
    const int64_t qkv_rows = check_rows(qkv, num_live, "qkv");
    STD_TORCH_CHECK(qkv_rows == num_rows, "qkv must have one row for each of dq, ", num_rows, ", got ", qkv_rows);
    for (const Tensor& t : qkv) {
      check_dtype(t, dtype, dq, "qkv");
      check_shape(t, {t.size(0), (num_heads + 2 * num_kv_heads) * head_dim}, "qkv");
    }
    return head_dim;
  }
};

// ---- reorder_rows ---------------------------------------------------------------------------------------------------

struct ReorderRowsTensors {
  int64_t num_rows, row_bytes;
  Tensor x, index, y;

  ReorderRowsTensors(const Tensor& x_in, const Tensor& index_in, const Tensor& inverse) {
    STD_TORCH_CHECK(x_in.dim() > 0, "x must have shape [N, ...], got a scalar");
    num_rows = x_in.size(0);
    check_dtype(inverse, ScalarType::Int, x_in, "inverse");
    check_shape(inverse, {num_rows}, "inverse");
    index = check_index(index_in, num_rows, num_rows, x_in, "index");
    x = as_contiguous(x_in);
    y = allocate(std::vector<int64_t>(x.sizes().begin(), x.sizes().end()), x.scalar_type(), x);
    row_bytes = num_rows ? x.numel() / num_rows * static_cast<int64_t>(x.element_size()) : 0;
  }
};

}  // namespace lmf
