"""Types of the block: the weights of one layer of a tower, RoPE tables, and rows of two towers."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lmfusion_kernels.layout.token_layout import TokenLayout
from lmfusion_kernels.runtime.pytrees import register_tree

TowerRows = Tensor | tuple[Tensor, Tensor]
"""Rows in tower order: one [N, d] tensor, or one per tower ([num_text, d_text], [num_image, d_image]), for example if
the image tower is narrower. Functions return the form that they were given."""


class RopeTables:
    """cos and sin, float32 [N, D/2] in sequence order, as `rope_tables` makes them. Unpacks like a pair.

    FSDP2 and DDP with mixed precision cast every floating-point tensor that they find in a module's arguments: in
    tuples, lists, dicts and dataclasses. They leave objects of other classes alone. This is a plain class, so the
    tables stay in float32.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return (self.cos, self.sin)[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.cos, self.sin))

    def __repr__(self) -> str:
        return f"RopeTables(cos={self.cos}, sin={self.sin})"

    def to(self, device: torch.device | str) -> "RopeTables":
        """The same tables on `device`."""
        return RopeTables(self.cos.to(device), self.sin.to(device))


Rope = RopeTables | tuple[Tensor, Tensor]
"""The tables of `rope_tables`, or a pair (cos, sin), float32 [N, D/2] in sequence order."""


@dataclass(frozen=True)
class BlockWeights:
    """Weights of one tower in one layer, named as in Llama, with q, k, v and gate, up stacked into one matrix each.

    d: width of the tower, I: its FFN width, H and H_kv: query and key-value heads, D: head size. H, H_kv and D are the
    same in both towers.
    """

    input_layernorm: Tensor
    """[d]"""
    qkv_proj: Tensor
    """[(H + 2 H_kv) D, d]: rows of q, then k, then v"""
    o_proj: Tensor
    """[d, H D]"""
    post_attention_layernorm: Tensor
    """[d]"""
    gate_up_proj: Tensor
    """[2 I, d]: rows of gate, then up"""
    down_proj: Tensor
    """[d, I]"""
    qkv_bias: Tensor | None = None
    """[(H + 2 H_kv) D] (Qwen2)"""
    q_norm: Tensor | None = None
    """[D], applied per head before RoPE (Qwen3)"""
    k_norm: Tensor | None = None
    """[D]"""
    eps: float = 1e-6
    """epsilon of every norm"""

    def num_heads(self, rope: Rope) -> int:
        return self.o_proj.shape[1] // (2 * rope[0].shape[-1])


def rope_tables(position: Tensor, inv_freq: Tensor, attention_scaling: float = 1.0) -> RopeTables:
    """cos and sin of every token's rotation angles, float32 [N, D/2], once per batch for all layers.

    position: integer [N] in sequence order. inv_freq: [D/2] angular frequencies in float32 or float64.
    attention_scaling multiplies both tables (YaRN-type context extensions). Raises ValueError for positions or
    frequencies in bfloat16 or float16, whose angles would be wrong.
    """
    for name, tensor in (("inv_freq", inv_freq), ("position", position)):
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} must be float32 or float64 (position: or an integer), got {tensor.dtype}, too coarse for "
                "angles. module.to(dtype) and module.half() cast buffers too: compute inv_freq again in float32, or "
                "load the model in its dtype, as from_pretrained(..., dtype=...) does, and move it with .to(device)"
            )
    angles = position.to(torch.float32)[:, None] * inv_freq.to(torch.float32)
    return RopeTables(angles.cos() * attention_scaling, angles.sin() * attention_scaling)


register_tree(
    RopeTables,
    "lmfusion_kernels.RopeTables",
    lambda rope: {"cos": rope.cos, "sin": rope.sin},
    lambda x: RopeTables(**x),
)


def split_towers(x: TowerRows, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """The text rows and the image rows of `x` in tower order, as views."""
    if isinstance(x, Tensor):
        layout.check_rows(x)
        return x[: layout.num_text], x[layout.num_text :]
    x_text, x_image = x
    layout.check_rows(x_text, layout.num_text, "text rows")
    layout.check_rows(x_image, layout.num_image, "image rows")
    return x_text, x_image


def join_towers(text: Tensor, image: Tensor, like: TowerRows) -> TowerRows:
    """The rows of both towers in the form of `like`: one tensor, or one per tower."""
    return torch.cat([text, image]) if isinstance(like, Tensor) else (text, image)
