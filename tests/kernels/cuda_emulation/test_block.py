"""The block equals the reference with the CUDA row ops, in all forms of training."""

import pytest
import torch

from tests.kernels.block import test_routed_block as on_cpu
from tests.kernels.cuda_emulation.device import to_device
from tests.kernels.ops.row_ops import needs_native

ROW_OPS = {
    "rms_norm_kernel", "rms_norm_any_kernel", "rms_norm_backward_kernel", "rms_norm_backward_any_kernel",
    "rope_reorder_kernel", "rope_reorder_any_kernel", "rope_backward_kernel", "rope_norm_backward_kernel",
    "rope_backward_any_kernel", "swiglu_kernel", "swiglu_backward_kernel", "sum_partials_kernel",
}  # fmt: skip


def make_layout(documents, frozen_text):
    return to_device(on_cpu.lk.TokenLayout.from_spans(documents, frozen_text=frozen_text))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen_text", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("variant", ["plain", "qk_norm", "narrow", "one tensor"])
def test_equals_reference(cuda_ops, dtype, frozen_text, variant):
    image_width = 16 if variant == "narrow" else 32
    block = on_cpu.make_block(dtype, image_width, frozen_text=frozen_text, qk_norm=variant == "qk_norm")
    layout = make_layout(on_cpu.DOCUMENTS, frozen_text)
    x, rope = on_cpu.make_inputs(layout, dtype, image_width, paired=variant != "one tensor")
    cuda_ops.launched()
    on_cpu.assert_as_good_as_reference(block, x, layout, rope)
    launched = [name for name in cuda_ops.launched() if name != "reorder_rows_kernel"]
    assert set(launched) <= ROW_OPS
    # Two norms, RoPE and SwiGLU forward; the same backward, with sums of the gradients of up to three norms.
    assert 8 <= len(launched) <= 11


@needs_native
@pytest.mark.parametrize("recompute", ["none", "ffn", "layer"])
def test_recompute(cuda_ops, recompute):
    block = on_cpu.make_block(torch.float32, frozen_text=True)
    layout = make_layout(on_cpu.DOCUMENTS, True)
    x, rope = on_cpu.make_inputs(layout, torch.float32)
    exact = on_cpu.run(block, x, layout, rope, "reference")
    result = on_cpu.run(block, x, layout, rope, "native", recompute=recompute)
    for name, target in exact.items():
        torch.testing.assert_close(result[name], target, rtol=1e-3, atol=1e-3)


@needs_native
@pytest.mark.parametrize("documents", [[], [[("text", 1)]], [[("image", 1)]], [[("text", 12)]]], ids=str)
def test_batches_of_one_kind(cuda_ops, documents):
    for frozen_text in (True, False):
        block = on_cpu.make_block(frozen_text=frozen_text)
        layout = make_layout(documents, frozen_text)
        x, rope = on_cpu.make_inputs(layout, torch.float32)
        on_cpu.assert_as_good_as_reference(block, x, layout, rope)
