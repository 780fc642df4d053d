// RoPE with reorder on the CPU: checks, results, threads. The arithmetic is in cpu/rope_reorder_kernel.cpp.

#include "rope_reorder.h"

#include "../common/allocate.h"
#include "../common/arguments.h"
#include "rms_norm.h"

namespace lmf {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> rope_reorder(
    const Tensors& qkv_in, const Tensor& cos_in, const Tensor& sin_in, const Tensor& tower_to_sequence,
    const Tensor& query_row, int64_t num_text, int64_t num_constant, int64_t num_heads,
    const OptionalTensor& text_q_norm, const OptionalTensor& text_k_norm, const OptionalTensor& image_q_norm,
    const OptionalTensor& image_k_norm, double eps) {
  const int64_t num_rows = check_rows(qkv_in, num_text, "qkv");
  const int64_t head_dim = check_angles(cos_in, sin_in, num_rows, qkv_in[0]), width = qkv_in[0].size(1);
  const int64_t num_kv_heads = check_heads(qkv_in, num_heads, head_dim);
  check_num_constant(num_constant, num_text);
  const ScalarType dtype = qkv_in[0].scalar_type();
  const Norms norms({&text_q_norm, &text_k_norm, &image_q_norm, &image_k_norm}, head_dim, qkv_in[0]);
  const Tensor sequence_row = check_index(tower_to_sequence, num_rows, num_rows, qkv_in[0], "tower_to_sequence");
  const Tensor query_rows = check_index(query_row, num_rows, num_rows, qkv_in[0], "query_row");
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
          nullptr,
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

Tensor rope_reorder_cached(
    const Tensors& qkv_in, const Tensor& cos_in, const Tensor& sin_in, const Tensor& tower_to_sequence,
    const Tensor& key_slot_in, int64_t num_text, int64_t num_heads, const OptionalTensor& text_q_norm,
    const OptionalTensor& text_k_norm, const OptionalTensor& image_q_norm, const OptionalTensor& image_k_norm,
    double eps, const Tensor& k_cache, const Tensor& v_cache) {
  const int64_t num_rows = check_rows(qkv_in, num_text, "qkv");
  const int64_t head_dim = check_angles(cos_in, sin_in, num_rows, qkv_in[0]), width = qkv_in[0].size(1);
  const int64_t num_kv_heads = check_heads(qkv_in, num_heads, head_dim);
  const int64_t num_slots = check_caches(k_cache, v_cache, num_kv_heads, head_dim, qkv_in[0]);
  const Norms norms({&text_q_norm, &text_k_norm, &image_q_norm, &image_k_norm}, head_dim, qkv_in[0]);
  const Tensor sequence_row = check_index(tower_to_sequence, num_rows, num_rows, qkv_in[0], "tower_to_sequence");
  const Tensor key_slot = check_index(key_slot_in, num_rows, num_slots, qkv_in[0], "key_slot");
  const Tensors qkv = as_contiguous(qkv_in);
  const Tensor cos = as_contiguous(cos_in), sin = as_contiguous(sin_in);
  const Tensor q = allocate({num_rows, num_heads, head_dim}, qkv[0].scalar_type());
  with_element_type(qkv[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto qkv_rows = towers_of<T>(qkv, num_text);
    parallel_towers(qkv_rows.num_rows, grain_of(width), [&](int tower, int64_t begin, int64_t end) {
      const int32_t* to = data<int32_t>(sequence_row) + tower * num_text + begin;
      const RopeReorderRows<T> rows = {
          qkv_rows.row(tower, begin),
          data<float>(cos),
          data<float>(sin),
          to,
          to,
          data<int32_t>(key_slot),
          norms.weight<T>(2 * tower),
          norms.weight<T>(2 * tower + 1),
          nullptr,
          data<T>(q),
          data<T>(k_cache),
          data<T>(v_cache),
          end - begin,
          0,
          {num_heads, num_kv_heads, head_dim},
          static_cast<float>(eps)};
      LMF_CALL_KERNEL(rope_reorder_rows, rows);
    });
  });
  return q;
}

Tensors rope_reorder_backward(
    const Tensor& dq_in, const Tensor& dk_in, const Tensor& dv_in, const Tensors& qkv_in, const Tensor& cos_in,
    const Tensor& sin_in, const Tensor& active_row_in, const OptionalTensor& active_key_in, int64_t num_live,
    int64_t num_heads, const OptionalTensor& text_q_norm, const OptionalTensor& text_k_norm,
    const OptionalTensor& image_q_norm, const OptionalTensor& image_k_norm, double eps, bool text_norm_grad,
    bool image_norm_grad, bool joined) {
  const int64_t head_dim =
      check_rope_backward(dq_in, dk_in, dv_in, qkv_in, cos_in, sin_in, active_key_in.has_value(), num_live, num_heads);
  const ScalarType dtype = dq_in.scalar_type();
  const int64_t num_rows = dq_in.size(0), num_kv_heads = dk_in.size(1);
  const int64_t width = (num_heads + 2 * num_kv_heads) * head_dim;
  const Norms norms({&text_q_norm, &text_k_norm, &image_q_norm, &image_k_norm}, head_dim, dq_in);
  STD_TORCH_CHECK(norms.held.empty() || !qkv_in.empty(), "qkv is empty, but the backward of QK norm needs it");
  const Tensor active_row = check_index(active_row_in, num_rows, num_rows, dq_in, "active_row");
  OptionalTensor active_key;
  if (active_key_in) active_key = check_index(*active_key_in, num_rows, cos_in.size(0), dq_in, "active_key");
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
  m.impl("rope_reorder_cached", TORCH_BOX(&lmf::rope_reorder_cached));
  m.impl("rope_reorder_backward", TORCH_BOX(&lmf::rope_reorder_backward));
}
