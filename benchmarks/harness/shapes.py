"""The measured layers and batches: shapes of models, mask patterns, and which of them a device gets.

A CPU gets the small ones, so that a run takes less than five minutes on two cores, as on a GPU.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

Documents = list[list[tuple[Any, ...]]]


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a layer, the same in both towers."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool = False
    qkv_bias: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def qkv_width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Weights of one tower's GEMMs."""
        return self.hidden_size * (self.qkv_width + self.num_heads * self.head_dim + 3 * self.intermediate_size)


LMFUSION_8B = LayerShape("LMFusion-8B", 4096, 14336, 32, 8, 128)
BAGEL_7B = LayerShape("BAGEL-7B", 3584, 18944, 28, 4, 128, qk_norm=True, qkv_bias=True)
SMOLLM2 = LayerShape("SmolLM2-135M", 576, 1536, 9, 3, 64)
TINY = LayerShape("tiny", 256, 1024, 8, 2, 32)


def with_qk_norm(shape: LayerShape) -> LayerShape:
    """The same layer with norms of query and key heads, as diffusers' Cosmos3 layer has them."""
    return replace(shape, qk_norm=True)


HAS_GPU = torch.cuda.is_available()
DTYPES = [torch.bfloat16] if HAS_GPU else [torch.float32, torch.bfloat16]
DIRECTIONS = ["forward", "forward+backward"]
MAIN = LMFUSION_8B if HAS_GPU else SMOLLM2
"""The shape that is measured in every row."""
SHAPES = [LMFUSION_8B, BAGEL_7B, SMOLLM2] if HAS_GPU else [SMOLLM2]
PEER_SHAPE = BAGEL_7B if HAS_GPU else replace(TINY, qk_norm=True, qkv_bias=True)
NUM_TOKENS = 8192 if HAS_GPU else 1024
"""Tokens of a packed batch, unless a row says otherwise."""
ROW_OP_TOKENS = 65_536 if HAS_GPU else 4096
"""Rows of the memory-bound ops. On a GPU their tensors take half a gigabyte or more."""
MEMORY_BOUND = {"share_of_ceiling": 0.9} if HAS_GPU else {}
"""The share of a copy's bandwidth that the row ops promise to reach; on a CPU there is no such promise."""
TEXT_SHARES = [50, 0, 25, 75, 100]
"""Per cent. A run without time for all of them measures the first ones."""
FORWARD_CASES = [(shape, percent) for shape in SHAPES for percent in TEXT_SHARES if shape != SMOLLM2 or not HAS_GPU]
"""(shape, per cent of text) of the layer's forward rows."""


def by_dtype(cases: Iterable[tuple[Any, ...]], in_float32: Callable[..., bool]) -> list[Any]:
    """Parameters of a test: every case in bfloat16, and on a CPU those chosen by `in_float32` also in float32."""
    cases = list(cases)
    params = [(*case, torch.bfloat16) for case in cases]
    if not HAS_GPU:
        params = [(*case, torch.float32) for case in cases if in_float32(*case)] + params
    return [pytest.param(*values, id="-".join([*map(str, values[:-1]), dtype_id(values[-1])])) for values in params]


def dtype_id(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def share_of_text(num_tokens: int, percent: int, num_documents: int = 4) -> Documents:
    """Documents of text and one image each, with this percentage of text."""
    per_document = num_tokens // num_documents
    num_text = per_document * percent // 100
    spans = [("text", num_text), ("image", per_document - num_text)]
    return [[span for span in spans if span[1]]] * num_documents


def causal(num_tokens: int) -> Documents:
    return [[("text", num_tokens)]]


def packed_causal(num_tokens: int) -> Documents:
    """Eight text documents of different random lengths, the same in every run."""
    cuts = np.sort(np.random.default_rng(0).choice(np.arange(1, num_tokens), 7, replace=False))
    edges = [0, *cuts.tolist(), num_tokens]
    return [[("text", b - a)] for a, b in itertools.pairwise(edges)]


def caption_first(num_tokens: int) -> Documents:
    """Pairs of a caption and an image: one eighth text in a large batch, one quarter in a small one."""
    text, image = (64, 448) if num_tokens >= 2048 else (32, 96)
    return [[("text", text), ("image", image)]] * (num_tokens // (text + image))


def half_caption(num_tokens: int) -> Documents:
    """Pairs of a long caption and an image of as many tokens."""
    half = 256 if num_tokens >= 2048 else 128
    return [[("text", half), ("image", half)]] * (num_tokens // (2 * half))


def image_first(num_tokens: int) -> Documents:
    half = 256 if num_tokens >= 2048 else 128
    return [[("image", half), ("text", half)]] * (num_tokens // (2 * half))


def interleaved(num_tokens: int) -> Documents:
    """Documents of text, image, text, image, text: half text, with images of 256 tokens (64 in a small batch)."""
    image = 256 if num_tokens >= 2048 else 64
    texts = [image // 2, image, image // 2]
    document = [("text", texts[0]), ("image", image), ("text", texts[1]), ("image", image), ("text", texts[2])]
    return [document] * (num_tokens // (4 * image))


def one_image(num_tokens: int) -> Documents:
    return [[("image", num_tokens)]]


def noised_copies(num_tokens: int) -> Documents:
    """BAGEL's training layout: documents of a prompt, a noised hidden image, the same image clean, and a reply."""
    image = 384 if num_tokens >= 2048 else 96
    text = image // 3
    document = [("text", text), ("image", image, "hidden"), ("image", image), ("text", text)]
    return [document] * (num_tokens // (2 * image + 2 * text))


PATTERNS: dict[str, Callable[[int], Documents]] = {
    "causal": causal,
    "packed causal": packed_causal,
    "caption-first pairs": caption_first,
    "interleaved": interleaved,
    "one long image": one_image,
}


def attention_cases() -> list[tuple[str, int, str]]:
    """(pattern, tokens, direction) of the attention rows: all patterns at one length, two of them at all lengths."""
    main, lengths = (8192, [2048, 32_768, 131_072]) if HAS_GPU else (1024, [256, 2048])
    cases = [(pattern, main, direction) for pattern in PATTERNS for direction in DIRECTIONS]
    cases += [("interleaved", length, "forward+backward") for length in lengths]
    cases += [("interleaved", length, "forward") for length in lengths if HAS_GPU]
    return cases + [("causal", length, "forward") for length in lengths]
