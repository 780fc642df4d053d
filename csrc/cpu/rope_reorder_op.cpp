// RoPE with reordering on the CPU: the ops and their threads. The arithmetic is in rope_reorder_kernel.cpp.

#include "rope_reorder.h"

#include "../common/op_arguments.h"
#include "rms_norm.h"
#include "threads.h"

namespace lmf {
namespace {

// Runs the kernel over the rows of both towers. set_targets(rows, first_row) fills in where these rows go; first_row
// counts the text tower's rows first.
template <typename T, typename F>
void run_rope_reorder(const RopeReorderTensors& t, int64_t num_text, double eps, const F& set_targets) {
  const auto qkv_rows = towers_of<T>(t.qkv, num_text);
  parallel_towers(qkv_rows.num_rows, grain_of(qkv_rows.width[0]), [&](int tower, int64_t begin, int64_t end) {
    const int64_t first_row = tower * num_text + begin;
    RopeReorderRows<T> rows = {};
    rows.qkv = qkv_rows.row(tower, begin);
    rows.cos = data<float>(t.cos);
    rows.sin = data<float>(t.sin);
    rows.sequence_row = data<int32_t>(t.sequence_row) + first_row;
    rows.q_norm = t.norms.weight<T>(2 * tower);
    rows.k_norm = t.norms.weight<T>(2 * tower + 1);
    rows.num_rows = end - begin;
    rows.heads = {t.num_heads, t.num_kv_heads, t.head_dim};
    rows.eps = static_cast<float>(eps);
    set_targets(rows, first_row);
    LMF_CALL_KERNEL(rope_reorder_rows, rows);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rope_reorder(
    const Tensors& qkv, const Tensor& cos, const Tensor& sin, const Tensor& tower_to_sequence,
    const Tensor& query_row_in, int64_t num_text, int64_t num_constant, int64_t num_heads,
    const OptionalTensor& text_q_norm, const OptionalTensor& text_k_norm, const OptionalTensor& image_q_norm,
    const OptionalTensor& image_k_norm, double eps) {
  const RopeReorderTensors t(
      qkv, cos, sin, tower_to_sequence, num_text, num_heads,
      {&text_q_norm, &text_k_norm, &image_q_norm, &image_k_norm});
  check_num_constant(num_constant, num_text);
  const Tensor query_row = check_index(query_row_in, t.num_rows, t.num_rows, t.qkv[0], "query_row");
  const RopeReorderResults results(t, num_constant);
  with_element_type(t.dtype(), [&](auto zero) {
    using T = decltype(zero);
    run_rope_reorder<T>(t, num_text, eps, [&](RopeReorderRows<T>& rows, int64_t first_row) {
      rows.query_row = data<int32_t>(query_row) + first_row;
      rows.num_constant = num_constant;
      rows.q_constant = data<T>(results.q_constant);
      rows.q = data<T>(results.q);
      rows.k = data<T>(results.k);
      rows.v = data<T>(results.v);
    });
  });
  return {results.q_constant, results.q, results.k, results.v};
}

Tensor rope_reorder_cached(
    const Tensors& qkv, const Tensor& cos, const Tensor& sin, const Tensor& tower_to_sequence,
    const Tensor& key_slot_in, int64_t num_text, int64_t num_heads, const OptionalTensor& text_q_norm,
    const OptionalTensor& text_k_norm, const OptionalTensor& image_q_norm, const OptionalTensor& image_k_norm,
    double eps, const Tensor& k_cache, const Tensor& v_cache) {
  const RopeReorderTensors t(
      qkv, cos, sin, tower_to_sequence, num_text, num_heads,
      {&text_q_norm, &text_k_norm, &image_q_norm, &image_k_norm});
  const int64_t num_slots = check_caches(k_cache, v_cache, t.num_kv_heads, t.head_dim, t.qkv[0]);
  const Tensor key_slot = check_index(key_slot_in, t.num_rows, num_slots, t.qkv[0], "key_slot");
  const Tensor q = t.allocate_heads(t.num_rows, num_heads);
  with_element_type(t.dtype(), [&](auto zero) {
    using T = decltype(zero);
    run_rope_reorder<T>(t, num_text, eps, [&](RopeReorderRows<T>& rows, int64_t) {
      rows.query_row = rows.sequence_row;
      rows.key_slot = data<int32_t>(key_slot);
      rows.q = data<T>(q);
      rows.k = data<T>(k_cache);
      rows.v = data<T>(v_cache);
    });
  });
  return q;
}

Tensors rope_reorder_backward(
    const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensors& qkv, const Tensor& cos, const Tensor& sin,
    const Tensor& active_row, const OptionalTensor& active_key, int64_t num_live, int64_t num_heads,
    const OptionalTensor& text_q_norm, const OptionalTensor& text_k_norm, const OptionalTensor& image_q_norm,
    const OptionalTensor& image_k_norm, double eps, bool text_norm_grad, bool image_norm_grad, bool joined) {
  const RopeReorderBackwardTensors t(
      dq, dk, dv, qkv, cos, sin, active_row, active_key, num_live, num_heads,
      {&text_q_norm, &text_k_norm, &image_q_norm, &image_k_norm}, text_norm_grad, image_norm_grad, joined);
  with_element_type(t.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto qkv_rows = towers_of<T>(t.qkv, num_live), dqkv_rows = towers_of<T>(t.dqkv, num_live);
    const Chunks chunks(t.num_rows);
    const int64_t head_dim = t.head_dim;
    std::vector<float> partials(t.dnorms.empty() ? 0 : chunks.count * 4 * head_dim);
    torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t first_chunk, int64_t last_chunk) {
      for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
        float* sums[4];
        for (int i = 0; i < 4; ++i) sums[i] = t.norm_grad[i] ? partials.data() + (chunk * 4 + i) * head_dim : nullptr;
        const RopeReorderBackwardRows<T> rows = {
            data<T>(t.dq),
            data<T>(t.dk),
            data<T>(t.dv),
            {qkv_rows.rows[0], qkv_rows.rows[1]},
            data<float>(t.cos),
            data<float>(t.sin),
            data<int32_t>(t.active_row),
            t.active_key ? data<int32_t>(*t.active_key) : nullptr,
            {t.norms.weight<T>(0), t.norms.weight<T>(2)},
            {t.norms.weight<T>(1), t.norms.weight<T>(3)},
            {dqkv_rows.rows[0], dqkv_rows.rows[1]},
            {sums[0], sums[2]},
            {sums[1], sums[3]},
            chunks.begin(chunk),
            chunks.end(chunk),
            num_live,
            {num_heads, t.num_kv_heads, head_dim},
            static_cast<float>(eps)};
        LMF_CALL_KERNEL(rope_reorder_backward_rows, rows);
      }
    });
    auto dnorm = t.dnorms.begin();
    for (int i = 0; i < 4; ++i) {
      if (!t.norm_grad[i]) continue;
      T* out = data<T>(*dnorm++);
      LMF_CALL_KERNEL(sum_partials, partials.data() + i * head_dim, chunks.count, 4 * head_dim, head_dim, out);
    }
  });
  return t.results();
}

}  // namespace
}  // namespace lmf

STABLE_TORCH_LIBRARY_IMPL(lmfusion, CPU, m) {
  m.impl("rope_reorder", TORCH_BOX(&lmf::rope_reorder));
  m.impl("rope_reorder_cached", TORCH_BOX(&lmf::rope_reorder_cached));
  m.impl("rope_reorder_backward", TORCH_BOX(&lmf::rope_reorder_backward));
}
