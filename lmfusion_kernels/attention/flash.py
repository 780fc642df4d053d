"""PyTorch's own FlashAttention-2, aten::_flash_attention_forward and _backward: the kernel "flash".

Nothing to install. bfloat16 and float16, head sizes that are multiples of 8 up to 256, compute capability 8.0 and
later; with and without a key-value cache (which has no backward). The backward adds up dq with atomics, so its last
bits vary from run to run; under torch.use_deterministic_algorithms(True) they do not. Untested on GPU.
"""

import torch
from torch import Tensor

from lmfusion_kernels.attention.availability import unsupported_by_flash, unsupported_device
from lmfusion_kernels.attention.interface import AttentionProblem, Gradients
from lmfusion_kernels.attention.packed_causal import Sequences, at_least_two
from lmfusion_kernels.runtime.device import capability

# Both ops are private and may change. These are the arguments passed here, by name, as torch 2.10 to 2.15 have them.
FORWARD_ARGUMENTS = (
    "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "return_debug_mask",
    "scale", "seqused_k",
)  # fmt: skip
BACKWARD_ARGUMENTS = (
    "grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p",
    "is_causal", "rng_state", "unused", "scale",
)  # fmt: skip


def schema_difference() -> str:
    """How this PyTorch's ops differ from what this file calls; empty if they do not."""
    for name, known in (
        ("_flash_attention_forward", FORWARD_ARGUMENTS),
        ("_flash_attention_backward", BACKWARD_ARGUMENTS),
    ):
        packet = getattr(torch.ops.aten, name, None)
        if packet is None:
            return f"torch {torch.__version__} has no aten::{name}"
        arguments = {argument.name: argument for argument in packet.default._schema.arguments}
        missing = [argument for argument in known if argument not in arguments]
        unknown = [name for name, a in arguments.items() if name not in known and not a.has_default_value()]
        if missing or unknown:
            return f"aten::{name} of torch {torch.__version__} has other arguments ({', '.join(missing + unknown)})"
    return ""


class TorchFlash:
    """Packed causal attention by PyTorch's own kernels."""

    summary = "two causal calls of PyTorch's FlashAttention-2"

    def unavailable_reason(self, device: torch.device) -> str:
        if reason := unsupported_device(device, "8.0 or later", ((8, 99),)):
            return reason
        if not torch.backends.cuda.is_flash_attention_available():
            return "this build of torch has no FlashAttention"
        return schema_difference()

    def unsupported_reason(self, problem: AttentionProblem) -> str:
        if reason := unsupported_by_flash(problem):
            return reason
        small = ((8, 6), (8, 9), (12, 0), (12, 1))  # too little shared memory for the backward of large heads
        if problem.needs_grad and problem.head_dim > 192 and capability(problem.device) in small:
            return f"its backward takes head sizes up to 192 on this device, not {problem.head_dim}"
        return ""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        bounds = sequences.query_start, sequences.key_start, at_least_two(sequences, q), sequences.max_keys
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *bounds, 0.0, True, False, scale=scale, seqused_k=sequences.num_keys
        )
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        sequences: Sequences,
        scale: float,
    ) -> Gradients:
        bounds = sequences.query_start, sequences.key_start, sequences.max_queries, sequences.max_keys
        random_state = sequences.query_start.new_empty(2, dtype=torch.uint64)  # read with dropout only
        return torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse, *bounds, 0.0, True, random_state, random_state, scale=scale
        )
