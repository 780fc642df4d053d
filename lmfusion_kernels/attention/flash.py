"""FlashAttention-2 as it comes inside PyTorch, aten::_flash_attention_forward and _backward: the kernel "flash".

Nothing to install. bfloat16 and float16, head sizes that are multiples of 8 up to 256, compute capability 8.0 and
later; with and without a key-value cache (which has no backward). The backward adds up dq with atomics, so its last
bits vary from run to run; under torch.use_deterministic_algorithms(True) they do not. Untested on GPU.
"""

import torch
from torch import Tensor

from lmfusion_kernels.attention.installed import why_not_device, why_not_flash
from lmfusion_kernels.attention.interface import AttentionProblem
from lmfusion_kernels.attention.two_pass import Sequences
from lmfusion_kernels.runtime.device import capability

# Both are private, so they may change: what is passed here, by name, as torch 2.10 to 2.15 have it.
FORWARD_ARGUMENTS = (
    "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "return_debug_mask",
    "scale", "seqused_k",
)  # fmt: skip
BACKWARD_ARGUMENTS = (
    "grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p",
    "is_causal", "rng_state", "unused", "scale",
)  # fmt: skip


def why_schema_differs() -> str:
    """Why this PyTorch's ops cannot be called as this file calls them; empty if they can."""
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
        if reason := why_not_device(device, "8.0 or later", ((8, 99),)):
            return reason
        if not torch.backends.cuda.is_flash_attention_available():
            return "this build of torch has no FlashAttention"
        return why_schema_differs()

    def unsupported_reason(self, case: AttentionProblem) -> str:
        if reason := why_not_flash(case):
            return reason
        small = ((8, 6), (8, 9), (12, 0), (12, 1))  # too little shared memory for the backward of large heads
        if case.needs_grad and case.head_dim > 192 and capability(case.device) in small:
            return f"its backward takes head sizes up to 192 on this device, not {case.head_dim}"
        return ""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            sequences.query_start,
            sequences.key_start,
            at_least_two(sequences.max_queries, q, sequences.query_start),
            sequences.max_keys,
            0.0,
            True,
            False,
            scale=scale,
            seqused_k=sequences.num_keys,
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        no_random_numbers = sequences.query_start.new_empty(2, dtype=torch.uint64)  # read with dropout alone
        return torch.ops.aten._flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            sequences.query_start,
            sequences.key_start,
            sequences.max_queries,
            sequences.max_keys,
            0.0,
            True,
            no_random_numbers,
            no_random_numbers,
            scale=scale,
        )


def at_least_two(max_queries: int, q: Tensor, query_start: Tensor) -> int:
    """The bound on queries for FlashAttention-2, which takes 1 to say that every sequence has just one query.

    It then reads q as [number of sequences, ...], but here some may have none. The bound is only a bound.
    """
    return 2 if max_queries == 1 and q.shape[0] != query_start.shape[0] - 1 else max_queries
