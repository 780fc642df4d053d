// RMSNorm of rows of two towers on the CPU: checks, results, threads. The arithmetic is in cpu/rms_norm_kernel.cpp.

#include "rms_norm.h"

#include "../common/allocate.h"
#include "../common/arguments.h"

namespace lmf {
namespace {

Tensors rms_norm(
    const Tensors& x_in, const Tensors& residual_in, const Tensor& text_weight, const Tensor& image_weight,
    int64_t num_text, double eps, int64_t num_constant, bool keep_text, bool keep_image) {
  const int64_t num_rows = check_rows(x_in, num_text, "x");
  check_num_constant(num_constant, num_text);
  check_norm_weights(x_in, text_weight, image_weight);
  if (!residual_in.empty()) check_like(residual_in, x_in, "residual");
  const Tensors x = as_contiguous(x_in), residual = as_contiguous(residual_in);
  const Tensor weights[2] = {as_contiguous(text_weight), as_contiguous(image_weight)};
  const Tensors y = allocate_like(x), sum = allocate_like(residual);
  const Tensor rstd = allocate({num_rows}, ScalarType::Float);
  const bool is_kept[2] = {keep_text, keep_image};
  const int64_t first_kept[2] = {num_constant, 0};
  const int64_t num_kept[2] = {num_text - num_constant, num_rows - num_text};
  Tensors kept;
  for (int tower : {0, 1}) {
    if (is_kept[tower]) {
      kept.push_back(allocate({num_kept[tower], (tower ? x.back() : x[0]).size(1)}, x[0].scalar_type()));
    }
  }
  with_element_type(x[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto x_rows = towers_of<T>(x, num_text), residual_rows = towers_of<T>(residual, num_text);
    const auto y_rows = towers_of<T>(y, num_text), sum_rows = towers_of<T>(sum, num_text);
    const auto& normed_rows = sum.empty() ? x_rows : sum_rows;
    T* const copies[2] = {keep_text ? data<T>(kept[0]) : nullptr, keep_image ? data<T>(kept.back()) : nullptr};
    parallel_towers(x_rows.num_rows, grain_of(x_rows.width[0]), [&](int tower, int64_t begin, int64_t end) {
      const RmsNormRows<T> rows = {
          x_rows.row(tower, begin),
          residual_rows.row(tower, begin),
          data<T>(weights[tower]),
          y_rows.row(tower, begin),
          sum_rows.row(tower, begin),
          data<float>(rstd) + tower * num_text + begin,
          end - begin,
          x_rows.width[tower],
          static_cast<float>(eps)};
      LMF_CALL_KERNEL(rms_norm_rows, rows);
      if (is_kept[tower]) {
        copy_rows_from(
            first_kept[tower], begin, end, normed_rows.width[tower], normed_rows.row(tower, 0), copies[tower]);
      }
    });
  });
  Tensors result = y;
  append(result, sum);
  append(result, kept);
  result.push_back(rstd);
  return result;
}

Tensors rms_norm_backward(
    const Tensors& dy_in, const Tensors& x_in, const Tensor& rstd_in, const Tensor& text_weight,
    const Tensor& image_weight, int64_t num_text, const Tensors& dresidual_in, bool text_grad, bool image_grad,
    bool recompute) {
  const int64_t num_rows = check_rows(x_in, num_text, "x");
  check_norm_weights(x_in, text_weight, image_weight);
  check_like(dy_in, x_in, "dy");
  if (!dresidual_in.empty()) check_like(dresidual_in, x_in, "dresidual");
  check_dtype(rstd_in, ScalarType::Float, x_in[0], "rstd");
  check_shape(rstd_in, {num_rows}, "rstd");
  const Tensors dy = as_contiguous(dy_in), x = as_contiguous(x_in), dresidual = as_contiguous(dresidual_in);
  const Tensor weights[2] = {as_contiguous(text_weight), as_contiguous(image_weight)}, rstd = as_contiguous(rstd_in);
  const bool weight_grad[2] = {text_grad, image_grad};
  const Tensors dx = allocate_like(x), y = recompute ? allocate_like(x) : Tensors{};
  Tensors dweights;
  with_element_type(x[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto dy_rows = towers_of<T>(dy, num_text), x_rows = towers_of<T>(x, num_text);
    const auto dresidual_rows = towers_of<T>(dresidual, num_text);
    const auto dx_rows = towers_of<T>(dx, num_text), y_rows = towers_of<T>(y, num_text);
    const Chunks chunks[2] = {Chunks(x_rows.num_rows[0]), Chunks(x_rows.num_rows[1])};
    std::vector<float> partials[2];
    for (int tower : {0, 1}) {
      if (weight_grad[tower]) partials[tower].resize(chunks[tower].count * x_rows.width[tower]);
    }
    parallel_towers({chunks[0].count, chunks[1].count}, 1, [&](int tower, int64_t first_chunk, int64_t last_chunk) {
      for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
        const int64_t begin = chunks[tower].begin(chunk), width = x_rows.width[tower];
        const RmsNormBackwardRows<T> rows = {
            dy_rows.row(tower, begin),
            x_rows.row(tower, begin),
            data<float>(rstd) + tower * num_text + begin,
            data<T>(weights[tower]),
            dresidual_rows.row(tower, begin),
            dx_rows.row(tower, begin),
            weight_grad[tower] ? partials[tower].data() + chunk * width : nullptr,
            y_rows.row(tower, begin),
            chunks[tower].end(chunk) - begin,
            width};
        LMF_CALL_KERNEL(rms_norm_backward_rows, rows);
      }
    });
    for (int tower : {0, 1}) {
      if (!weight_grad[tower]) continue;
      const int64_t width = x_rows.width[tower];
      dweights.push_back(allocate({width}, x[0].scalar_type()));
      T* out = data<T>(dweights.back());
      torch::stable::parallel_for(0, width, 1024, [&](int64_t begin, int64_t end) {
        LMF_CALL_KERNEL(
            sum_partials, partials[tower].data() + begin, chunks[tower].count, width, end - begin, out + begin);
      });
    }
  });
  Tensors result = dx;
  append(result, dweights);
  append(result, y);
  return result;
}

}  // namespace
}  // namespace lmf

STABLE_TORCH_LIBRARY_IMPL(lmfusion, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&lmf::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&lmf::rms_norm_backward));
}
