// torch.ops.lmfusion.hybrid_attention and its backward on the CPU: checks, buffers, and the threads that run the tasks.

#include "hybrid_attention.h"

#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cmath>
#include <tuple>

#include "../common/checks.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows of a tile (queries times heads of a group). The forward reads a key tile once for all rows, so a large number is
// good. The backward also keeps its weights, which should stay in the nearest caches.
constexpr int64_t kForwardRows = 192;
constexpr int64_t kBackwardRows = 96;

const int32_t* int32_vector(const Tensor& x, int64_t size, const char* name) {
  STD_TORCH_CHECK(
      x.dim() == 1 && x.size(0) == size && x.scalar_type() == ScalarType::Int && x.is_contiguous(),
      "hybrid_attention: ", name, " must be a contiguous int32 vector with ", size, " entries, got ", lmf::shape_of(x),
      " of ", torch::headeronly::toString(x.scalar_type()));
  return x.const_data_ptr<int32_t>();
}

void check_heads(const Tensor& x, int64_t rows, int64_t heads, int64_t dim, ScalarType dtype, const char* name) {
  const bool fits = x.dim() == 3 && x.size(0) == rows && x.size(1) == heads && x.size(2) == dim;
  STD_TORCH_CHECK(
      fits && x.scalar_type() == dtype, "hybrid_attention: ", name, " must be [", rows, ", ", heads, ", ", dim,
      "] and of q's dtype, got ", lmf::shape_of(x), " of ", torch::headeronly::toString(x.scalar_type()));
}

Tensor empty_floats(int64_t size) { return torch::stable::empty({size}, ScalarType::Float); }

// Runs body(task, worker) for all tasks. They begin in ascending order, each on the next free worker.
template <typename Body>
void run_tasks(int64_t num_tasks, int64_t num_workers, const Body& body) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, num_workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t task = next++; task < num_tasks; task = next++) body(task, worker);
  });
}

// The fields of `Attention`, and the memory that they point to.
struct Setup {
  Tensor q, k, v;  // contiguous
  std::vector<int32_t> packed_tile, tile_slot, visible_end, least_visible_end, most_visible_end;
  std::vector<Tensor> buffers;
  int64_t num_workers = torch::stable::get_num_threads();

  float* buffer(int64_t size) {
    buffers.push_back(empty_floats(size));
    return buffers.back().mutable_data_ptr<float>();
  }

  void fill(
      lmf::Attention& a, const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Tensor& key_start,
      const Tensor& key_end, const std::optional<Tensor>& out_row, double scale,
      const std::optional<Tensor>& visible_end, int64_t rows_per_tile) {
    const ScalarType dtype = q_any.scalar_type();
    STD_TORCH_CHECK(
        dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
        "hybrid_attention: q must be float32 or bfloat16 on the CPU, got ", torch::headeronly::toString(dtype));
    STD_TORCH_CHECK(
        q_any.dim() == 3 && k_any.dim() == 3, "hybrid_attention: q must be [Nq, H, D], k and v [Nk, H_kv, D], got ",
        lmf::shape_of(q_any), " and ", lmf::shape_of(k_any));
    a.num_queries = q_any.size(0), a.num_heads = q_any.size(1), a.head_dim = q_any.size(2);
    a.num_keys = k_any.size(0), a.num_kv_heads = k_any.size(1);
    check_heads(k_any, a.num_keys, a.num_kv_heads, a.head_dim, dtype, "k");
    check_heads(v_any, a.num_keys, a.num_kv_heads, a.head_dim, dtype, "v");
    STD_TORCH_CHECK(
        a.head_dim > 0 && a.num_kv_heads > 0 && a.num_heads > 0 && a.num_heads % a.num_kv_heads == 0,
        "hybrid_attention: the number of query heads must be a multiple of the ", a.num_kv_heads,
        " key-value heads, got ", a.num_heads);
    q = torch::stable::contiguous(q_any), k = torch::stable::contiguous(k_any), v = torch::stable::contiguous(v_any);
    a.q = q.const_data_ptr(), a.k = k.const_data_ptr(), a.v = v.const_data_ptr();
    a.is_bfloat16 = dtype == ScalarType::BFloat16;
    a.key_start = int32_vector(key_start, a.num_queries, "key_start");
    a.key_end = int32_vector(key_end, a.num_queries, "key_end");
    a.out_row = out_row ? int32_vector(*out_row, a.num_queries, "out_row") : nullptr;
    check_ranges(a);
    if (visible_end) hide_keys(a, int32_vector(*visible_end, a.num_keys, "visible_end"));
    const float score_scale = static_cast<float>(scale);
    const bool is_above_one = std::fabs(score_scale) > 1.0f;
    a.row_factor = is_above_one ? std::copysign(1.0f, score_scale) : score_scale;
    a.score_factor = is_above_one ? std::fabs(score_scale) : 1.0f;
    a.padded_dim = (a.head_dim + lmf::kHeadPadding - 1) / lmf::kHeadPadding * lmf::kHeadPadding;
    a.queries_per_tile = std::max<int64_t>(1, rows_per_tile / a.group());
    a.num_query_tiles = (a.num_queries + a.queries_per_tile - 1) / a.queries_per_tile;
    find_tiles(a);
  }

  // Indices out of range would read memory outside the tensors, and the tiling relies on the order.
  static void check_ranges(const lmf::Attention& a) {
    int32_t start = 0, end = 0;
    bool good = true;
    for (int64_t i = 0; i < a.num_queries; ++i) {
      good &= a.key_start[i] >= start && a.key_end[i] >= end && a.key_start[i] <= a.key_end[i];
      start = a.key_start[i], end = a.key_end[i];
      if (a.out_row != nullptr) good &= a.out_row[i] >= 0 && a.out_row[i] < a.num_queries;
    }
    STD_TORCH_CHECK(
        good && end <= a.num_keys, "hybrid_attention: key_start and key_end must not decrease and lie within the ",
        a.num_keys, " keys, out_row within the queries");
  }

  void hide_keys(lmf::Attention& a, const int32_t* ends) {
    const int64_t num_tiles = (a.num_keys + lmf::kKeyTile - 1) / lmf::kKeyTile;
    visible_end.assign(num_tiles * lmf::kKeyTile, 0);
    std::copy_n(ends, a.num_keys, visible_end.begin());
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t first = tile * lmf::kKeyTile;
      const auto [least, most] = std::minmax_element(ends + first, ends + std::min(first + lmf::kKeyTile, a.num_keys));
      least_visible_end.push_back(*least), most_visible_end.push_back(*most);
    }
    a.visible_end = visible_end.data();
    a.least_visible_end = least_visible_end.data(), a.most_visible_end = most_visible_end.data();
  }

  // A key cache may be much longer than its content, so only tiles with keys that a query sees are packed.
  void find_tiles(lmf::Attention& a) {
    tile_slot.assign(a.num_keys / lmf::kKeyTile + 1, 0);
    int64_t next_tile = 0;
    for (int64_t i = 0; i < a.num_queries; ++i) {
      next_tile = std::max<int64_t>(next_tile, a.key_start[i] / lmf::kKeyTile);
      for (; next_tile * lmf::kKeyTile < a.key_end[i]; ++next_tile) {
        tile_slot[next_tile] = static_cast<int32_t>(packed_tile.size());
        packed_tile.push_back(static_cast<int32_t>(next_tile));
      }
    }
    a.packed_tile = packed_tile.data(), a.tile_slot = tile_slot.data();
    a.num_packed = static_cast<int64_t>(packed_tile.size());
  }

  void pack(const lmf::Attention& a) const {
    run_tasks(a.num_kv_heads * a.num_packed, num_workers, [&](int64_t task, int64_t) {
      LMF_CALL_KERNEL(pack_keys, a, task);
    });
  }

  int64_t packed_size(const lmf::Attention& a, int64_t width) const {
    return a.num_kv_heads * a.num_packed * lmf::kKeyTile * width;
  }
};

std::tuple<Tensor, Tensor> hybrid_attention(
    Tensor q, Tensor k, Tensor v, Tensor key_start, Tensor key_end, std::optional<Tensor> out_row, double scale,
    std::optional<Tensor> visible_end, std::optional<Tensor>) {
  lmf::AttentionForward a{};
  Setup setup;
  setup.fill(a, q, k, v, key_start, key_end, out_row, scale, visible_end, kForwardRows);
  Tensor out = torch::stable::empty({a.num_queries, a.num_heads, a.head_dim}, q.scalar_type());
  Tensor lse = torch::stable::empty({a.num_heads, a.num_queries}, ScalarType::Float);
  a.out = out.mutable_data_ptr();
  a.lse = lse.mutable_data_ptr<float>();
  a.k_columns = setup.buffer(setup.packed_size(a, a.head_dim));
  a.v_rows = setup.buffer(setup.packed_size(a, a.padded_dim));
  a.scratch_size = LMF_CALL_KERNEL(forward_scratch, a);
  a.scratch = setup.buffer(setup.num_workers * a.scratch_size);
  setup.pack(a);
  run_tasks(a.num_kv_heads * a.num_query_tiles, setup.num_workers, [&](int64_t task, int64_t worker) {
    LMF_CALL_KERNEL(attention_forward, a, task, worker);
  });
  return {out, lse};
}

// Finds for each key tile the rank of its first listed key, and the query tile that adds to it first: the last one that
// sees it.
void order_key_grads(const lmf::AttentionBackward& a, std::vector<int32_t>& first_grad, std::vector<int32_t>& turn) {
  first_grad.assign(a.num_key_tiles + 1, static_cast<int32_t>(a.num_grad_keys));
  int64_t rank = 0;
  for (int64_t tile = 0; tile < a.num_key_tiles; ++tile) {
    while (rank < a.num_grad_keys && a.grad_key[rank] < tile * lmf::kKeyTile) ++rank;
    first_grad[tile] = static_cast<int32_t>(rank);
  }
  turn.assign(a.num_kv_heads * a.num_key_tiles, -1);
  int64_t query_tile = 0;
  for (int64_t tile = 0; tile < a.num_key_tiles; ++tile) {
    while (query_tile + 1 < a.num_query_tiles &&
           a.key_start[(query_tile + 1) * a.queries_per_tile] / lmf::kKeyTile <= tile)
      ++query_tile;
    for (int64_t head = 0; head < a.num_kv_heads; ++head) turn[head * a.num_key_tiles + tile] = query_tile;
  }
}

std::tuple<Tensor, Tensor, Tensor> hybrid_attention_backward(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor key_start, Tensor key_end,
    Tensor grad_key, Tensor query_start, Tensor query_end, std::optional<Tensor> out_row, double scale,
    std::optional<Tensor> visible_end, std::optional<Tensor>) {
  lmf::AttentionBackward a{};
  Setup setup;
  setup.fill(a, q, k, v, key_start, key_end, out_row, scale, visible_end, kBackwardRows);
  check_heads(dout, a.num_queries, a.num_heads, a.head_dim, q.scalar_type(), "dout");
  check_heads(out, a.num_queries, a.num_heads, a.head_dim, q.scalar_type(), "out");
  STD_TORCH_CHECK(
      lse.dim() == 2 && lse.size(0) == a.num_heads && lse.size(1) == a.num_queries &&
          lse.scalar_type() == ScalarType::Float,
      "hybrid_attention: lse must be float32 [", a.num_heads, ", ", a.num_queries, "], got ", lmf::shape_of(lse),
      " of ", torch::headeronly::toString(lse.scalar_type()));
  const Tensor dout_rows = torch::stable::contiguous(dout), out_rows = torch::stable::contiguous(out);
  const Tensor lse_rows = torch::stable::contiguous(lse);
  a.dout = dout_rows.const_data_ptr(), a.out = out_rows.const_data_ptr(), a.lse = lse_rows.const_data_ptr<float>();

  a.num_grad_keys = grad_key.numel();
  a.grad_key = int32_vector(grad_key, a.num_grad_keys, "grad_key");
  // The GPU kernels, which go over key tiles, need these two; here key_start and key_end suffice.
  int32_vector(query_start, a.num_grad_keys, "query_start");
  int32_vector(query_end, a.num_grad_keys, "query_end");
  for (int64_t r = 0; r < a.num_grad_keys; ++r)
    STD_TORCH_CHECK(
        a.grad_key[r] > (r == 0 ? -1 : a.grad_key[r - 1]) && a.grad_key[r] < a.num_keys,
        "hybrid_attention: grad_key must ascend within the ", a.num_keys, " keys");
  a.num_key_tiles = (a.num_keys + lmf::kKeyTile - 1) / lmf::kKeyTile;
  std::vector<int32_t> first_grad, turn;
  order_key_grads(a, first_grad, turn);
  a.first_grad = first_grad.data(), a.turn = turn.data();

  Tensor dq = torch::stable::empty({a.num_queries, a.num_heads, a.head_dim}, q.scalar_type());
  Tensor dk = torch::stable::empty({a.num_grad_keys, a.num_kv_heads, a.head_dim}, q.scalar_type());
  Tensor dv = torch::stable::empty({a.num_grad_keys, a.num_kv_heads, a.head_dim}, q.scalar_type());
  a.dq = dq.mutable_data_ptr(), a.dk = dk.mutable_data_ptr(), a.dv = dv.mutable_data_ptr();
  const int64_t num_sums = a.num_kv_heads * a.num_grad_keys * a.padded_dim;
  a.dk_sum = setup.buffer(num_sums);
  torch::stable::zero_(setup.buffers.back());
  a.dv_sum = setup.buffer(num_sums);
  torch::stable::zero_(setup.buffers.back());
  a.k_rows = setup.buffer(setup.packed_size(a, a.padded_dim));
  a.k_columns = setup.buffer(setup.packed_size(a, a.head_dim));
  a.v_columns = setup.buffer(setup.packed_size(a, a.head_dim));
  a.scratch_size = LMF_CALL_KERNEL(backward_scratch, a);
  a.scratch = setup.buffer(setup.num_workers * a.scratch_size);
  setup.pack(a);
  run_tasks(a.num_kv_heads * a.num_query_tiles, setup.num_workers, [&](int64_t task, int64_t worker) {
    LMF_CALL_KERNEL(attention_backward, a, task, worker);
  });
  torch::stable::parallel_for(0, a.num_grad_keys * a.num_kv_heads, 256, [&](int64_t begin, int64_t end) {
    LMF_CALL_KERNEL(store_key_grads, a, begin, end);
  });
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lmfusion, CPU, m) {
  m.impl("hybrid_attention", TORCH_BOX(&hybrid_attention));
  m.impl("hybrid_attention_backward", TORCH_BOX(&hybrid_attention_backward));
}
