// RoPE with reorder on one thread, forward and backward, with the optional norm of every query and key head; compiled
// once per instruction set.

#include "rope_reorder.h"

#include "../elementwise/rms_norm.h"
#include "../elementwise/rope.h"

namespace lmf {
namespace LMF_ISA {
namespace {

// kHalf: head_dim / 2 if it is a common one, so that loops over it unroll; else 0.
template <int kHalf>
LMF_HD int64_t half_of(const HeadCounts& heads) {
  return kHalf != 0 ? kHalf : heads.head_dim / 2;
}

template <typename T>
LMF_HD float head_rstd(const T* head, int64_t head_dim, float eps) {
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t j = 0; j < head_dim; ++j) squares += widen(head[j]) * widen(head[j]);
  return norm_rstd(squares, head_dim, eps);
}

template <typename T, int kHalf>
LMF_HD void rotate_heads(
    const T* in, int64_t num_heads, int64_t half, const float* __restrict cos, const float* __restrict sin,
    const T* __restrict norm, float eps, T* out) {
  if constexpr (kHalf != 0) half = kHalf;
  for (int64_t h = 0; h < num_heads; ++h) {
    const T* __restrict first = in + h * 2 * half;
    const T* __restrict second = first + half;
    T* __restrict out_first = out + h * 2 * half;
    T* __restrict out_second = out_first + half;
    if (norm == nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < half; ++j) {
        const RopePair y = rotate({widen(first[j]), widen(second[j])}, cos[j], sin[j]);
        out_first[j] = narrow<T>(y.first);
        out_second[j] = narrow<T>(y.second);
      }
    } else {
      const float rstd = head_rstd(first, 2 * half, eps);
#pragma omp simd
      for (int64_t j = 0; j < half; ++j) {
        const float x1 = norm_element(widen(first[j]), widen(norm[j]), rstd);
        const float x2 = norm_element(widen(second[j]), widen(norm[half + j]), rstd);
        const RopePair y = rotate({x1, x2}, cos[j], sin[j]);
        out_first[j] = narrow<T>(y.first);
        out_second[j] = narrow<T>(y.second);
      }
    }
  }
}

template <typename T, int kHalf>
void forward(const RopeReorderRows<T>& rows) {
  const int64_t half = half_of<kHalf>(rows.heads);
  const int64_t q_width = rows.heads.num_heads * 2 * half, kv_width = rows.heads.num_kv_heads * 2 * half;
  for (int64_t i = 0; i < rows.num_rows; ++i) {
    const T* q = rows.qkv + i * (q_width + 2 * kv_width);
    const T* k = q + q_width;
    const int64_t to = rows.sequence_row[i], query_to = rows.query_row[i];
    const int64_t key_to = rows.key_slot ? rows.key_slot[to] : to;
    const float* cos = rows.cos + to * half;
    const float* sin = rows.sin + to * half;
    T* q_out = query_to < rows.num_constant ? rows.q_constant + query_to * q_width
                                            : rows.q + (query_to - rows.num_constant) * q_width;
    rotate_heads<T, kHalf>(q, rows.heads.num_heads, half, cos, sin, rows.q_norm, rows.eps, q_out);
    rotate_heads<T, kHalf>(
        k, rows.heads.num_kv_heads, half, cos, sin, rows.k_norm, rows.eps, rows.k + key_to * kv_width);
    memcpy(rows.v + key_to * kv_width, k + kv_width, kv_width * sizeof(T));
  }
}

// dy: gradient of the rotated heads. x: the heads before norm and rotation, read only where there is a norm.
template <typename T, int kHalf>
LMF_HD void rotate_heads_back(
    const T* dy, const T* x, int64_t num_heads, int64_t half, const float* __restrict cos, const float* __restrict sin,
    const T* __restrict norm, float eps, float* __restrict dnorm, T* dx) {
  if constexpr (kHalf != 0) half = kHalf;
  for (int64_t h = 0; h < num_heads; ++h) {
    const T* __restrict dy_first = dy + h * 2 * half;
    const T* __restrict dy_second = dy_first + half;
    T* __restrict dx_first = dx + h * 2 * half;
    T* __restrict dx_second = dx_first + half;
    if (norm == nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < half; ++j) {
        const RopePair grad = rotate_back({widen(dy_first[j]), widen(dy_second[j])}, cos[j], sin[j]);
        dx_first[j] = narrow<T>(grad.first);
        dx_second[j] = narrow<T>(grad.second);
      }
      continue;
    }
    const T* __restrict x_first = x + h * 2 * half;
    const T* __restrict x_second = x_first + half;
    const float rstd = head_rstd(x_first, 2 * half, eps);
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < half; ++j) {
      const RopePair grad = rotate_back({widen(dy_first[j]), widen(dy_second[j])}, cos[j], sin[j]);
      dot += widen(norm[j]) * grad.first * widen(x_first[j]);
      dot += widen(norm[half + j]) * grad.second * widen(x_second[j]);
    }
    const float correction = norm_correction(dot, 2 * half, rstd);
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) {
      const RopePair grad = rotate_back({widen(dy_first[j]), widen(dy_second[j])}, cos[j], sin[j]);
      const float x1 = widen(x_first[j]), x2 = widen(x_second[j]);
      dx_first[j] = narrow<T>(norm_backward_element(grad.first, x1, widen(norm[j]), rstd, correction));
      dx_second[j] = narrow<T>(norm_backward_element(grad.second, x2, widen(norm[half + j]), rstd, correction));
    }
    if (dnorm == nullptr) continue;
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) {
      const RopePair grad = rotate_back({widen(dy_first[j]), widen(dy_second[j])}, cos[j], sin[j]);
      dnorm[j] += norm_weight_grad(grad.first, widen(x_first[j]), rstd);
      dnorm[half + j] += norm_weight_grad(grad.second, widen(x_second[j]), rstd);
    }
  }
}

template <typename T, int kHalf>
void backward(const RopeReorderBackwardRows<T>& rows) {
  const int64_t half = half_of<kHalf>(rows.heads);
  const int64_t q_width = rows.heads.num_heads * 2 * half, kv_width = rows.heads.num_kv_heads * 2 * half;
  for (int64_t rank = rows.begin; rank < rows.end; ++rank) {
    const int tower = rows.active_row[rank] < rows.num_text ? 0 : 1;
    const int64_t offset = (rows.active_row[rank] - tower * rows.num_text) * (q_width + 2 * kv_width);
    const int64_t angle = rows.active_key ? rows.active_key[rank] : rank;
    const float* cos = rows.cos + angle * half;
    const float* sin = rows.sin + angle * half;
    const T* x = rows.qkv[tower] ? rows.qkv[tower] + offset : nullptr;
    T* dx = rows.dqkv[tower] + offset;
    rotate_heads_back<T, kHalf>(
        rows.dq + rank * q_width, x, rows.heads.num_heads, half, cos, sin, rows.q_norm[tower], rows.eps,
        rows.dq_norm[tower], dx);
    rotate_heads_back<T, kHalf>(
        rows.dk + rank * kv_width, x ? x + q_width : nullptr, rows.heads.num_kv_heads, half, cos, sin,
        rows.k_norm[tower], rows.eps, rows.dk_norm[tower], dx + q_width);
    memcpy(dx + q_width + kv_width, rows.dv + rank * kv_width, kv_width * sizeof(T));
  }
}

template <typename T>
void choose_head_size(const RopeReorderRows<T>& rows) {
  if (rows.heads.head_dim == 64) return forward<T, 32>(rows);
  if (rows.heads.head_dim == 128) return forward<T, 64>(rows);
  forward<T, 0>(rows);
}

template <typename T>
void choose_head_size(const RopeReorderBackwardRows<T>& rows) {
  if (rows.heads.head_dim == 64) return backward<T, 32>(rows);
  if (rows.heads.head_dim == 128) return backward<T, 64>(rows);
  backward<T, 0>(rows);
}

}  // namespace

void rope_reorder_rows(const RopeReorderRows<float>& rows) { choose_head_size(rows); }
void rope_reorder_rows(const RopeReorderRows<bfloat16>& rows) { choose_head_size(rows); }
void rope_reorder_backward_rows(const RopeReorderBackwardRows<float>& rows) { choose_head_size(rows); }
void rope_reorder_backward_rows(const RopeReorderBackwardRows<bfloat16>& rows) { choose_head_size(rows); }

}  // namespace LMF_ISA
}  // namespace lmf
