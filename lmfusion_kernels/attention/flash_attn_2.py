"""FlashAttention-2 of the package flash-attn, 2.7 or later: the kernel "flash-attn-2".

bfloat16 and float16, head sizes that are multiples of 8 up to 256, compute capability 8.0 and later; with and without a
key-value cache (which has no backward). dq is added up with atomics, so its last bits vary from run to run; under
torch.use_deterministic_algorithms(True) they do not. Its ops are registered with torch, so torch.compile traces them.
Untested on GPU.
"""

import torch
from torch import Tensor

from lmfusion_kernels.attention.flash import at_least_two
from lmfusion_kernels.attention.installed import (
    has_module,
    version_of,
    wants_deterministic,
    why_no_import,
    why_not_device,
    why_not_flash,
)
from lmfusion_kernels.attention.interface import AttentionProblem
from lmfusion_kernels.attention.two_pass import Sequences


class FlashAttn2:
    """Packed causal attention by flash_attn.flash_attn_interface."""

    summary = "two causal calls of FlashAttention-2"
    install = "pip install flash-attn --no-build-isolation"

    def unavailable_reason(self, device: torch.device) -> str:
        found = version_of("flash-attn")
        if found is None or not has_module("flash_attn"):
            return f"flash-attn is not installed; `{self.install}`"
        if not (2, 7) <= found < (3,):
            return (
                f"flash-attn {'.'.join(map(str, found))} is installed, and it needs version 2 from 2.7 on; "
                f"`{self.install}`"
            )
        return why_not_device(device, "8.0 or later", ((8, 99),)) or why_no_import("flash_attn.flash_attn_interface")

    def unsupported_reason(self, case: AttentionProblem) -> str:
        return why_not_flash(case)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        from flash_attn import flash_attn_interface

        out, lse, _, _ = flash_attn_interface._wrapped_flash_attn_varlen_forward(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=sequences.query_start,
            cu_seqlens_k=sequences.key_start,
            max_seqlen_q=at_least_two(sequences.max_queries, q, sequences.query_start),
            max_seqlen_k=sequences.max_keys,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=True,
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
        from flash_attn import flash_attn_interface

        # Contiguous: given others, the package would fill copies that it does not return.
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        flash_attn_interface._wrapped_flash_attn_varlen_backward(
            dout=dout,
            q=q,
            k=k,
            v=v,
            out=out,
            softmax_lse=lse,
            dq=dq,
            dk=dk,
            dv=dv,
            cu_seqlens_q=sequences.query_start,
            cu_seqlens_k=sequences.key_start,
            max_seqlen_q=sequences.max_queries,
            max_seqlen_k=sequences.max_keys,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=True,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=wants_deterministic(),
        )
        return dq, dk, dv
