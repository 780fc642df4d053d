"""nn.Modules around `routed_block`: one layer of a tower with Llama's names, and a block of two of them."""

import math

import torch
from torch import Tensor, nn

from lmfusion_kernels.block.routed_block import routed_block
from lmfusion_kernels.block.weights import BlockWeights, Rope, TowerRows
from lmfusion_kernels.layout.token_layout import TokenLayout
from lmfusion_kernels.ops.lora import effective_weight

SEPARATIONS = ("deep", "shallow", "none")


def _resolve_head_dim(num_heads: int, num_kv_heads: int, head_dim: int | None, **widths: int) -> int:
    """head_dim, by default hidden_size / num_heads. Raises ValueError, with names and values, for impossible sizes."""
    given = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, **widths}
    if head_dim is not None:
        given["head_dim"] = head_dim
    for name, size in given.items():
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads {num_kv_heads}, got {num_heads}")
    if head_dim is None:
        head_dim, rest = divmod(widths["hidden_size"], num_heads)
        if rest:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads {num_heads}, got {widths['hidden_size']}; give head_dim"
            )
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, since RoPE rotates pairs of numbers, got {head_dim}")
    return head_dim


class NormWeight(nn.Module):
    """The weight of an RMSNorm; the block applies it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class TowerAttention(nn.Module):
    """Projections of one tower around the shared attention; q, k and v stacked into one matrix."""

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, qkv_bias: bool, qk_norm: bool
    ) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(hidden_size, (num_heads + 2 * num_kv_heads) * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.q_norm = NormWeight(head_dim) if qk_norm else None
        self.k_norm = NormWeight(head_dim) if qk_norm else None


class TowerMLP(nn.Module):
    """SwiGLU feed-forward weights of one tower; gate and up stacked into one matrix."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)


class TowerLayer(nn.Module):
    """One decoder layer of one tower: parameters only, `routed_block` computes.

    hidden_size (d), intermediate_size (I), num_heads (H), num_kv_heads (H_kv), head_dim (D, default d / H), qkv_bias
    (Qwen2), qk_norm (Qwen3), eps of the norms. Raises ValueError for sizes that are not positive or do not divide.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        head_dim = _resolve_head_dim(
            num_heads, num_kv_heads, head_dim, hidden_size=hidden_size, intermediate_size=intermediate_size
        )
        self.input_layernorm = NormWeight(hidden_size)
        self.self_attn = TowerAttention(hidden_size, num_heads, num_kv_heads, head_dim, qkv_bias, qk_norm)
        self.post_attention_layernorm = NormWeight(hidden_size)
        self.mlp = TowerMLP(hidden_size, intermediate_size)
        self.eps = eps

    @torch.no_grad()
    def initialize(self, num_layers: int, std: float = 0.02) -> None:
        """Truncated normal weights, norms at 1. Projections into the residual stream: smaller by sqrt(2 num_layers)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                is_last = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = std / math.sqrt(2 * num_layers) if is_last else std
                nn.init.trunc_normal_(parameter, std=scale, a=-3 * scale, b=3 * scale)

    def weights(self, dtype: torch.dtype) -> BlockWeights:
        """The parameters in `dtype`; a cast is part of the graph, so float32 parameters can train under bf16 rows.

        If peft has put LoRA on a projection, its weight is the adapted one. Raises ValueError for adapters that are
        more than a sum of weights: see `lmfusion_kernels.ops.lora.effective_weight`.
        """
        attention, mlp = self.self_attn, self.mlp

        def cast(parameter: Tensor | None) -> Tensor | None:
            return None if parameter is None else parameter.to(dtype)

        return BlockWeights(
            input_layernorm=self.input_layernorm.weight.to(dtype),
            qkv_proj=self.projection(attention.qkv_proj, dtype),
            o_proj=self.projection(attention.o_proj, dtype),
            post_attention_layernorm=self.post_attention_layernorm.weight.to(dtype),
            gate_up_proj=self.projection(mlp.gate_up_proj, dtype),
            down_proj=self.projection(mlp.down_proj, dtype),
            qkv_bias=cast(attention.qkv_proj.bias),
            q_norm=cast(attention.q_norm.weight if attention.q_norm is not None else None),
            k_norm=cast(attention.k_norm.weight if attention.k_norm is not None else None),
            eps=self.eps,
        )

    def projection(self, linear: nn.Module, dtype: torch.dtype) -> Tensor:
        """The weight of one of its linear maps."""
        return effective_weight(linear, dtype)

    def share(self, other: "TowerLayer", separation: str) -> None:
        """Use the other tower's modules where `separation` shares them.

        "deep": nothing is shared. "shallow": the attention and its norm are shared. "none": everything is shared.
        """
        if separation not in SEPARATIONS:
            raise ValueError(f"separation must be one of {', '.join(SEPARATIONS)}, got {separation!r}")
        if separation in ("shallow", "none"):
            self.input_layernorm, self.self_attn = other.input_layernorm, other.self_attn
        if separation == "none":
            self.post_attention_layernorm, self.mlp = other.post_attention_layernorm, other.mlp


class RoutedBlock(nn.Module):
    """A two-tower decoder layer that stands in for a transformer layer.

    Arguments are those of `TowerLayer`; the image tower may be narrower with image_hidden_size and
    image_intermediate_size (then rows are given as a pair). separation: "deep" (own weights throughout), "shallow" (own
    feed-forward network, shared attention weights) or "none". With frozen_text the text tower requires no gradient;
    build layouts with the same frozen_text, whose default differs. Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        eps: float = 1e-6,
        image_hidden_size: int | None = None,
        image_intermediate_size: int | None = None,
        separation: str = "deep",
        frozen_text: bool = False,
    ) -> None:
        super().__init__()
        image_hidden_size = hidden_size if image_hidden_size is None else image_hidden_size
        image_intermediate_size = intermediate_size if image_intermediate_size is None else image_intermediate_size
        head_dim = _resolve_head_dim(
            num_heads,
            num_kv_heads,
            head_dim,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            image_hidden_size=image_hidden_size,
            image_intermediate_size=image_intermediate_size,
        )
        if separation != "deep" and image_hidden_size != hidden_size:
            raise ValueError(
                f"separation {separation!r} shares weights, so image_hidden_size {image_hidden_size} must equal "
                f"hidden_size {hidden_size}"
            )
        if separation == "none" and image_intermediate_size != intermediate_size:
            raise ValueError(
                f"separation 'none' shares every weight, so image_intermediate_size {image_intermediate_size} must "
                f"equal intermediate_size {intermediate_size}"
            )
        shared = (num_heads, num_kv_heads, head_dim, qkv_bias, qk_norm, eps)
        self.head_dim = head_dim
        self.text = TowerLayer(hidden_size, intermediate_size, *shared)
        self.image = TowerLayer(image_hidden_size, image_intermediate_size, *shared)
        for tower in (self.text, self.image):
            tower.initialize(num_layers=1)
        self.image.share(self.text, separation)
        if frozen_text:
            self.text.requires_grad_(False)

    def forward(
        self,
        x: TowerRows,
        layout: TokenLayout,
        rope: Rope,
        order: str = "tower",
        backend: str | None = None,
        recompute: str = "none",
    ) -> TowerRows:
        """See `routed_block`."""
        if rope[0].shape[-1] != self.head_dim // 2:
            raise ValueError(
                f"rope's cos and sin must be {self.head_dim // 2} wide for heads of {self.head_dim}, one angle per "
                f"pair, got {rope[0].shape[-1]}; make them with rope_tables"
            )
        dtype = x.dtype if isinstance(x, Tensor) else x[0].dtype
        text, image = self.text.weights(dtype), self.image.weights(dtype)
        return routed_block(x, layout, text, image, rope, order, backend, recompute=recompute)
