"""torch's scaled_dot_product_attention by backend, in the three exact ways in which it can compute this mask.

"causal": one call, for a batch of one text document. "mask": one call with a dense boolean mask. "spans": one call per
span, with the keys of its document up to the end of the span, full for an image and causal (lower right) for text; no
mask, but as many calls as spans. Keys and values are expanded to all heads. This, the layout [1, H, N, D] and the masks
are made before the clock starts.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

import lmfusion_kernels as lk
from benchmarks.harness.compare import UnavailableError
from benchmarks.harness.shapes import Documents

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
MOST_MASK_TOKENS = 16_384
MOST_SPANS = 256

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal(documents: Documents, layout: lk.TokenLayout) -> Attend:
    if len(documents) != 1 or any(modality != "text" for modality, _ in documents[0]):
        raise UnavailableError("is_causal fits only a batch of one text document")
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)


def dense_mask(documents: Documents, layout: lk.TokenLayout) -> Attend:
    if layout.num_tokens > MOST_MASK_TOKENS:
        raise UnavailableError(f"a dense mask of {layout.num_tokens} x {layout.num_tokens} is too large to measure")
    mask = lk.reference.hybrid_mask(layout)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def by_span(documents: Documents, layout: lk.TokenLayout) -> Attend:
    if sum(len(document) for document in documents) > MOST_SPANS:
        raise UnavailableError(f"more than {MOST_SPANS} spans: one call per span is not measured")
    calls: list[tuple[slice, slice, Any]] = []
    end = 0
    for document in documents:
        document_start = end
        for modality, length in document:
            start, end = end, end + length
            bias = causal_lower_right(length, end - document_start) if modality == "text" else None
            calls.append((slice(start, end), slice(document_start, end), bias))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for queries, keys, bias in calls:
            q_part, k_part, v_part = q[:, :, queries], k[:, :, keys], v[:, :, keys]
            if bias is None:
                parts.append(F.scaled_dot_product_attention(q_part, k_part, v_part))
            elif q_part.shape[2] == k_part.shape[2]:
                parts.append(F.scaled_dot_product_attention(q_part, k_part, v_part, is_causal=True))
            else:
                parts.append(F.scaled_dot_product_attention(q_part, k_part, v_part, attn_mask=bias))
        return torch.cat(parts, dim=2)

    return attend


WAYS: dict[str, Callable[[Documents, lk.TokenLayout], Attend]] = {
    "causal": causal,
    "mask": dense_mask,
    "spans": by_span,
}


def sdpa(backend: str, way: str, documents: Documents, layout: lk.TokenLayout) -> Attend:
    """Attention of [1, H, N, D] tensors by one backend and one of the `WAYS`."""
    attend = WAYS[way](documents, layout)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(BACKENDS[backend]):
            try:
                return attend(q, k, v)
            except RuntimeError as error:
                if "No available kernel" in str(error) or "No viable backend" in str(error):
                    raise UnavailableError(f"torch's {backend} attention does not support this case") from None
                raise

    return call


def expanded(x: Tensor, num_heads: int) -> Tensor:
    """[N, heads, D] -> [1, num_heads, N, D]."""
    return x.repeat_interleave(num_heads // x.shape[1], dim=1).transpose(0, 1)[None].contiguous()


def folded(grad: Tensor, num_heads: int) -> Tensor:
    """[1, H, N, D] -> [N, num_heads, D]: the gradients of the copies of a head are added."""
    return grad[0].transpose(0, 1).unflatten(1, (num_heads, -1)).sum(2)
