// RMSNorm of rows of two towers on the CPU: the ops and their threads. The arithmetic is in rms_norm_kernel.cpp.

#include "rms_norm.h"

#include "../common/op_arguments.h"
#include "threads.h"

namespace lmf {
namespace {

Tensors rms_norm(
    const Tensors& x_in, const Tensors& residual_in, const Tensor& text_weight, const Tensor& image_weight,
    int64_t num_text, double eps, int64_t num_constant, bool keep_text, bool keep_image) {
  const RmsNormTensors t(x_in, residual_in, text_weight, image_weight, num_text, num_constant, keep_text, keep_image);
  with_element_type(t.x[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto x_rows = towers_of<T>(t.x, num_text), residual_rows = towers_of<T>(t.residual, num_text);
    const auto y_rows = towers_of<T>(t.y, num_text), sum_rows = towers_of<T>(t.sum, num_text);
    const auto& normed_rows = t.sum.empty() ? x_rows : sum_rows;
    parallel_towers(x_rows.num_rows, grain_of(x_rows.width[0]), [&](int tower, int64_t begin, int64_t end) {
      const RmsNormRows<T> rows = {
          x_rows.row(tower, begin),
          residual_rows.row(tower, begin),
          data<T>(t.weights[tower]),
          y_rows.row(tower, begin),
          sum_rows.row(tower, begin),
          data<float>(t.rstd) + tower * num_text + begin,
          end - begin,
          x_rows.width[tower],
          static_cast<float>(eps)};
      LMF_CALL_KERNEL(rms_norm_rows, rows);
      if (t.is_kept[tower]) {
        copy_rows_from(
            t.first_kept[tower], begin, end, normed_rows.width[tower], normed_rows.row(tower, 0),
            t.kept_rows<T>(tower));
      }
    });
  });
  return t.results();
}

Tensors rms_norm_backward(
    const Tensors& dy_in, const Tensors& x_in, const Tensor& rstd_in, const Tensor& text_weight,
    const Tensor& image_weight, int64_t num_text, const Tensors& dresidual_in, bool text_grad, bool image_grad,
    bool recompute) {
  const RmsNormBackwardTensors t(
      dy_in, x_in, rstd_in, text_weight, image_weight, num_text, dresidual_in, text_grad, image_grad, recompute);
  with_element_type(t.x[0].scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto dy_rows = towers_of<T>(t.dy, num_text), x_rows = towers_of<T>(t.x, num_text);
    const auto dresidual_rows = towers_of<T>(t.dresidual, num_text);
    const auto dx_rows = towers_of<T>(t.dx, num_text), y_rows = towers_of<T>(t.y, num_text);
    const Chunks chunks[2] = {Chunks(x_rows.num_rows[0]), Chunks(x_rows.num_rows[1])};
    std::vector<float> partials[2];
    for (int tower : {0, 1}) {
      if (t.weight_grad[tower]) partials[tower].resize(chunks[tower].count * x_rows.width[tower]);
    }
    parallel_towers({chunks[0].count, chunks[1].count}, 1, [&](int tower, int64_t first_chunk, int64_t last_chunk) {
      for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
        const int64_t begin = chunks[tower].begin(chunk), width = x_rows.width[tower];
        const RmsNormBackwardRows<T> rows = {
            dy_rows.row(tower, begin),
            x_rows.row(tower, begin),
            data<float>(t.rstd) + tower * num_text + begin,
            data<T>(t.weights[tower]),
            dresidual_rows.row(tower, begin),
            dx_rows.row(tower, begin),
            t.weight_grad[tower] ? partials[tower].data() + chunk * width : nullptr,
            y_rows.row(tower, begin),
            chunks[tower].end(chunk) - begin,
            width};
        LMF_CALL_KERNEL(rms_norm_backward_rows, rows);
      }
    });
    for (int tower : {0, 1}) {
      if (!t.weight_grad[tower]) continue;
      const int64_t width = x_rows.width[tower];
      T* out = t.dweight<T>(tower);
      torch::stable::parallel_for(0, width, 1024, [&](int64_t begin, int64_t end) {
        LMF_CALL_KERNEL(
            sum_partials, partials[tower].data() + begin, chunks[tower].count, width, end - begin, out + begin);
      });
    }
  });
  return t.results();
}

}  // namespace
}  // namespace lmf

STABLE_TORCH_LIBRARY_IMPL(lmfusion, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&lmf::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&lmf::rms_norm_backward));
}
