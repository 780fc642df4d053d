"""BAGEL's own MoT layer: LMFUSION_PEER_BAGEL=/path/to/a/clone of https://github.com/ByteDance-Seed/Bagel"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask

from benchmarks.harness.layer import Layer, LayerCase
from benchmarks.peers.loading import attention_for, fill, import_from, set_trained

VARIABLE, URL = "LMFUSION_PEER_BAGEL", "https://github.com/ByteDance-Seed/Bagel"


def load() -> ModuleType:
    packages = ("modeling", "modeling.bagel", "modeling.qwen2", "modeling.cache_utils")
    return import_from(VARIABLE, URL, packages, "modeling.bagel.qwen2_navit")


def load_data_utils() -> ModuleType:
    """Its masks."""
    return import_from(VARIABLE, URL, ("data",), "data.data_utils")


def layer_of(case: LayerCase, freeze_und: bool = False) -> nn.Module:
    """Its layer with the case's weights, for training."""
    module, shape = load(), case.shape
    config = module.Qwen2Config(
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, rms_norm_eps=case.text.eps, layer_module="Qwen2MoTDecoderLayer",
        qk_norm=True, freeze_und=freeze_und, pad_token_id=0,
    )  # fmt: skip
    with torch.device(case.device):
        layer: nn.Module = module.Qwen2MoTDecoderLayer(config, 0, attn_module=module.PackedAttentionMoT)
    layer = layer.to(case.dtype).train()
    fill(layer, case)
    return layer


def run_packed(
    layer: nn.Module,
    packed: Tensor,
    case: LayerCase,
    sample_lens: Sequence[int],
    split_lens: Sequence[int],
    attn_modes: Sequence[str],
) -> Tensor:
    """The layer on a packed batch [N, d] under its own mask, `create_sparse_mask` of its splits.

    FlexAttention has no backward on a CPU, so PyTorch's attention with that mask, in full, stands in for it.
    """
    module = load()
    sparse = load_data_utils().create_sparse_mask(sample_lens, split_lens, attn_modes, str(case.device))
    mask = create_mask(sparse, None, None, len(packed), len(packed), device=str(case.device))[0, 0]

    def attend(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool, block_mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=block_mask, enable_gqa=enable_gqa)

    with mock.patch.object(module, "flex_attention", attend):
        result: Tensor = layer(packed, list(sample_lens), mask, *_rope_and_rows(case))
    return result


def _rope_and_rows(case: LayerCase) -> tuple[Any, Tensor, Tensor]:
    """Its tables of whole heads, and the rows of either tower."""
    rope = tuple(torch.cat([table, table], dim=-1).to(case.dtype) for table in case.rope)
    layout = case.layout
    return rope, *layout.tower_to_sequence.long().split([layout.num_text, layout.num_image])


def bagel(case: LayerCase, freeze_und: bool = False, freezes_text: bool = False) -> Layer:
    """The layer with its own parameters; it keeps rows in sequence order.

    freeze_und is BAGEL's own switch: it detaches activations, computes and keeps gradients of the text weights (zeros),
    and cuts the text loss off the image tower. freezes_text is requires_grad_(False), what its users would have to add.
    """
    module, layer = load(), layer_of(case, freeze_und)
    set_trained(layer, freezes_text)
    attend, mask = attention_for(case)

    def forward(packed: Tensor) -> Tensor:
        if attend is not None:
            module.flex_attention = attend  # type: ignore[attr-defined]
        result: Tensor = layer(packed, [case.layout.num_tokens], mask, *_rope_and_rows(case))
        return result

    return Layer(forward, list(layer.parameters()), "sequence")
