// RoPE with reorder on the CPU: checks, results, threads. The arithmetic is in cpu/rope_reorder.cpp.

#include "cpu/rope_reorder.h"

#include "allocate.h"
#include "checks.h"
#include "cpu/rms_norm.h"

namespace lmf {
namespace {

using OptionalTensor = std::optional<Tensor>;

struct Norms {
  Tensors held;
  int64_t at[4] = {-1, -1, -1, -1};  // text q, text k, image q, image k: place in `held`, -1 where there is none

  Norms(const OptionalTensor* const (&norms)[4], int64_t head_dim, ScalarType dtype) {
    static const char* const names[4] = {"text_q_norm", "text_k_norm", "image_q_norm", "image_k_norm"};
    for (int i = 0; i < 4; ++i) {
      if (!norms[i]->has_value()) continue;
      check_dtype(**norms[i], dtype, names[i]);
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
int64_t check_angles(const Tensor& cos, const Tensor& sin, int64_t num_rows) {
  check_dtype(cos, ScalarType::Float, "cos");
  check_dtype(sin, ScalarType::Float, "sin");
  STD_TORCH_CHECK(cos.dim() == 2, "cos has shape ", shape_of(cos), ", expected [N, D/2]");
  check_shape(cos, {num_rows < 0 ? cos.size(0) : num_rows, cos.size(1)}, "cos");
  check_shape(sin, {cos.size(0), cos.size(1)}, "sin");
  return 2 * cos.size(1);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rope_reorder(
    const Tensors& qkv_in, const Tensor& cos_in, const Tensor& sin_in, const Tensor& tower_to_sequence,
    const Tensor& query_row, int64_t num_text, int64_t num_constant, int64_t num_heads,
    const OptionalTensor& text_q_norm, const OptionalTensor& text_k_norm, const OptionalTensor& image_q_norm,
    const OptionalTensor& image_k_norm, double eps) {
  const int64_t num_rows = check_rows(qkv_in, num_text, "qkv");
  const int64_t head_dim = check_angles(cos_in, sin_in, num_rows), width = qkv_in[0].size(1);
  const int64_t num_kv_heads = head_dim > 0 ? (width / head_dim - num_heads) / 2 : 0;
  STD_TORCH_CHECK(
      num_heads > 0 && num_kv_heads > 0 && (num_heads + 2 * num_kv_heads) * head_dim == width &&
          qkv_in.back().size(1) == width,
      "qkv has ", width, " and ", qkv_in.back().size(1), " columns, expected (H + 2 H_kv) D with H = ", num_heads,
      ", D = ", head_dim);
  STD_TORCH_CHECK(
      num_constant >= 0 && num_constant <= num_text, "num_constant is ", num_constant, ", outside of [0, num_text]");
  const ScalarType dtype = qkv_in[0].scalar_type();
  const Norms norms({&text_q_norm, &text_k_norm, &image_q_norm, &image_k_norm}, head_dim, dtype);
  const Tensor sequence_row = check_index(tower_to_sequence, num_rows, num_rows, "tower_to_sequence");
  const Tensor query_rows = check_index(query_row, num_rows, num_rows, "query_row");
  const Tensors qkv = as_contiguous(qkv_in);
  const Tensor cos = as_contiguous(cos_in), sin = as_contiguous(sin_in);
  const Tensor q_constant = allocate({num_constant, num_heads, head_dim}, dtype);
  const Tensor q = allocate({num_rows - num_constant, num_heads, head_dim}, dtype);
  const Tensor k = allocate({num_rows, num_kv_heads, head_dim}, dtype);
  const Tensor v = allocate({num_rows, num_kv_heads, head_dim}, dtype);
  with_element_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto qkv_rows = towers_of<T>(qkv, num_text);
    parallel_towers(qkv_rows.num_rows, grain_of(width), [&](int tower, int64_t begin, int64_t end) {
      const int64_t row = tower * num_text + begin;
      const RopeReorderRows<T> rows = {
          qkv_rows.row(tower, begin),
          data<float>(cos),
          data<float>(sin),
          data<int32_t>(sequence_row) + row,
          data<int32_t>(query_rows) + row,
          norms.weight<T>(2 * tower),
          norms.weight<T>(2 * tower + 1),
          data<T>(q_constant),
          data<T>(q),
          data<T>(k),
          data<T>(v),
          end - begin,
          num_constant,
          {num_heads, num_kv_heads, head_dim},
          static_cast<float>(eps)};
      LMF_CALL_KERNEL(rope_reorder_rows, rows);
    });
  });
  return {q_constant, q, k, v};
}

Tensors rope_reorder_backward(
    const Tensor& dq_in, const Tensor& dk_in, const Tensor& dv_in, const Tensors& qkv_in, const Tensor& cos_in,
    const Tensor& sin_in, const Tensor& active_row_in, const OptionalTensor& active_key_in, int64_t num_live,
    int64_t num_heads, const OptionalTensor& text_q_norm, const OptionalTensor& text_k_norm,
    const OptionalTensor& image_q_norm, const OptionalTensor& image_k_norm, double eps, bool text_norm_grad,
    bool image_norm_grad, bool joined) {
  STD_TORCH_CHECK(
      dq_in.dim() == 3 && dk_in.dim() == 3, "dq, dk have shapes ", shape_of(dq_in), ", ", shape_of(dk_in),
      ", expected [A, H, D], [A, H_kv, D]");
  const ScalarType dtype = check_row_dtype(dq_in, "dq");
  const int64_t num_rows = dq_in.size(0), num_kv_heads = dk_in.size(1);
  const int64_t head_dim = check_angles(cos_in, sin_in, active_key_in ? -1 : num_rows);
  const int64_t width = (num_heads + 2 * num_kv_heads) * head_dim;
  check_shape(dq_in, {num_rows, num_heads, head_dim}, "dq");
  for (const auto& [t, name] : {std::pair(&dk_in, "dk"), std::pair(&dv_in, "dv")}) {
    check_dtype(*t, dtype, name);
    check_shape(*t, {num_rows, num_kv_heads, head_dim}, name);
  }
  STD_TORCH_CHECK(
      num_live >= 0 && num_live <= num_rows, "num_live is ", num_live, ", outside of [0, ", num_rows, "]");
  const Norms norms({&text_q_norm, &text_k_norm, &image_q_norm, &image_k_norm}, head_dim, dtype);
  STD_TORCH_CHECK(norms.held.empty() || !qkv_in.empty(), "qkv is empty, but the backward of QK norm needs it");
  if (!qkv_in.empty()) {
    STD_TORCH_CHECK(
        check_rows(qkv_in, num_live, "qkv") == num_rows, "qkv does not have ", num_rows, " rows, one for each of dq");
    for (const Tensor& t : qkv_in) {
      check_dtype(t, dtype, "qkv");
      check_shape(t, {t.size(0), width}, "qkv");
    }
  }
  const Tensor active_row = check_index(active_row_in, num_rows, num_rows, "active_row");
  OptionalTensor active_key;
  if (active_key_in) active_key = check_index(*active_key_in, num_rows, cos_in.size(0), "active_key");
  const Tensor dq = as_contiguous(dq_in), dk = as_contiguous(dk_in), dv = as_contiguous(dv_in);
  const Tensor cos = as_contiguous(cos_in), sin = as_contiguous(sin_in);
  const Tensors qkv = as_contiguous(qkv_in);
  Tensors result;
  if (joined) {
    result.push_back(allocate({num_rows, width}, dtype));
  } else {
    result.push_back(allocate({num_live, width}, dtype));
    result.push_back(allocate({num_rows - num_live, width}, dtype));
  }
  with_element_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto qkv_rows = towers_of<T>(qkv, num_live);
    const auto dqkv_rows = towers_of<T>(result, num_live);
    const Chunks chunks(num_rows);
    bool wanted[4];
    for (int i = 0; i < 4; ++i) wanted[i] = norms.has(i) && (i < 2 ? text_norm_grad : image_norm_grad);
    const bool any_wanted = wanted[0] || wanted[1] || wanted[2] || wanted[3];
    std::vector<float> partials(any_wanted ? chunks.count * 4 * head_dim : 0);
    torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t first_chunk, int64_t last_chunk) {
      for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
        float* sums[4];
        for (int i = 0; i < 4; ++i) sums[i] = wanted[i] ? partials.data() + (chunk * 4 + i) * head_dim : nullptr;
        const RopeReorderBackwardRows<T> rows = {
            data<T>(dq),
            data<T>(dk),
            data<T>(dv),
            {qkv_rows.rows[0], qkv_rows.rows[1]},
            data<float>(cos),
            data<float>(sin),
            data<int32_t>(active_row),
            active_key ? data<int32_t>(*active_key) : nullptr,
            {norms.weight<T>(0), norms.weight<T>(2)},
            {norms.weight<T>(1), norms.weight<T>(3)},
            {dqkv_rows.rows[0], dqkv_rows.rows[1]},
            {sums[0], sums[2]},
            {sums[1], sums[3]},
            chunks.begin(chunk),
            chunks.end(chunk),
            num_live,
            {num_heads, num_kv_heads, head_dim},
            static_cast<float>(eps)};
        LMF_CALL_KERNEL(rope_reorder_backward_rows, rows);
      }
    });
    for (int i = 0; i < 4; ++i) {
      if (!wanted[i]) continue;
      result.push_back(allocate({head_dim}, dtype));
      LMF_CALL_KERNEL(
          sum_partials, partials.data() + i * head_dim, chunks.count, 4 * head_dim, head_dim, data<T>(result.back()));
    }
  });
  return result;
}

}  // namespace
}  // namespace lmf

STABLE_TORCH_LIBRARY_IMPL(lmfusion, CPU, m) {
  m.impl("rope_reorder", TORCH_BOX(&lmf::rope_reorder));
  m.impl("rope_reorder_backward", TORCH_BOX(&lmf::rope_reorder_backward));
}
