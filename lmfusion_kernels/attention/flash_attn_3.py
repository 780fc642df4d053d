"""FlashAttention-3 for Hopper (the folder hopper/ of flash-attention, module flash_attn_interface): "flash-attn-3".

bfloat16 and float16, head sizes that are multiples of 8 up to 256 as far as the build has them, compute capability 9.0;
with and without a key-value cache (which has no backward). Builds without a backward are refused where a gradient is
needed. dq is added up with atomics unless torch.use_deterministic_algorithms(True).
Needs a version whose ops are registered with torch (2025-12 or later). Untested on GPU.
"""

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lmfusion_kernels.attention.availability import (
    has_module,
    import_failure,
    unsupported_device,
    wants_deterministic,
)
from lmfusion_kernels.attention.interface import AttentionProblem
from lmfusion_kernels.attention.packed_causal import FlashAttentionPackage, Sequences
from lmfusion_kernels.runtime.device import constant_result


class FlashAttn3(FlashAttentionPackage):
    """Packed causal attention by hopper's flash_attn_interface."""

    summary = "two causal calls of FlashAttention-3"
    install = "pip install flash-attn-3 --index-url https://download.pytorch.org/whl/cu130"

    def unavailable_reason(self, device: torch.device) -> str:
        if not (has_module("flash_attn_interface") and has_module("flash_attn_3")):
            return f"FlashAttention-3 is not installed; `{self.install}`"
        if reason := unsupported_device(device, "9.0", ((9, 9),)) or import_failure("flash_attn_interface"):
            return reason
        if not hasattr(torch.ops.flash_attn_3, "_flash_attn_backward"):
            return f"this FlashAttention-3 is older than its registered ops; `{self.install}`"
        return ""

    def unsupported_reason(self, problem: AttentionProblem) -> str:
        if reason := super().unsupported_reason(problem):
            return reason
        flags = build_flags()
        built = [size for size in (64, 96, 128, 192, 256) if not flags.get(f"FLASHATTENTION_DISABLE_HDIM{size}")]
        if not built or problem.head_dim > built[-1]:
            return f"it was built for head sizes up to {built[-1] if built else 0}, not {problem.head_dim}"
        if problem.needs_grad and flags.get("FLASHATTENTION_DISABLE_BACKWARD"):
            return f"it was built without a backward; `{self.install}`"
        if problem.dtype == torch.float16 and flags.get("FLASHATTENTION_DISABLE_FP16"):
            return "it was built without float16; use bfloat16"
        return ""

    def call_forward(self, arguments: dict[str, Any], sequences: Sequences) -> tuple[Tensor, ...]:
        import flash_attn_interface

        return flash_attn_interface._flash_attn_forward(**arguments, **sequences.by_name())

    def call_backward(self, arguments: dict[str, Any]) -> None:
        import flash_attn_interface

        flash_attn_interface._flash_attn_backward(**arguments, is_causal=True, deterministic=wants_deterministic())


@constant_result
def build_flags() -> dict[str, bool]:
    """What the installed build left out; empty if it does not say."""
    return _build_flags()


@lru_cache(maxsize=1)
def _build_flags() -> dict[str, bool]:
    if not has_module("flash_attn_config"):
        return {}
    return importlib.import_module("flash_attn_config").CONFIG["build_flags"]
