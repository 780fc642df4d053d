"""FlashAttention-2 of the package flash-attn, 2.7 or later: the kernel "flash-attn-2".

bfloat16 and float16, head sizes that are multiples of 8 up to 256, compute capability 8.0 and later; with and without a
key-value cache (which has no backward). dq is added up with atomics, so its last bits vary from run to run; under
torch.use_deterministic_algorithms(True) they do not. Its ops are registered with torch, so torch.compile traces them.
Untested on GPU.
"""

from typing import Any

import torch
from torch import Tensor

from lmfusion_kernels.attention.availability import (
    has_module,
    import_failure,
    installed_version,
    unsupported_device,
    wants_deterministic,
)
from lmfusion_kernels.attention.packed_causal import FlashAttentionPackage, Sequences, at_least_two


class FlashAttn2(FlashAttentionPackage):
    """Packed causal attention by flash_attn.flash_attn_interface."""

    summary = "two causal calls of FlashAttention-2"
    install = "pip install flash-attn --no-build-isolation"

    def unavailable_reason(self, device: torch.device) -> str:
        found = installed_version("flash-attn")
        if found is None or not has_module("flash_attn"):
            return f"flash-attn is not installed; `{self.install}`"
        if not (2, 7) <= found < (3,):
            return (
                f"flash-attn {'.'.join(map(str, found))} is installed, and it needs version 2 from 2.7 on; "
                f"`{self.install}`"
            )
        return unsupported_device(device, "8.0 or later", ((8, 99),)) or import_failure(
            "flash_attn.flash_attn_interface"
        )

    def call_forward(self, arguments: dict[str, Any], sequences: Sequences) -> tuple[Tensor, ...]:
        from flash_attn import flash_attn_interface

        bounds = sequences.by_name() | {"max_seqlen_q": at_least_two(sequences, arguments["q"])}
        return flash_attn_interface._wrapped_flash_attn_varlen_forward(**arguments, **bounds, dropout_p=0.0)

    def call_backward(self, arguments: dict[str, Any]) -> None:
        from flash_attn import flash_attn_interface

        flash_attn_interface._wrapped_flash_attn_varlen_backward(
            **arguments,
            causal=True,
            dropout_p=0.0,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=wants_deterministic(),
        )
