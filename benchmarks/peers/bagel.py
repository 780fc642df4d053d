"""BAGEL's own MoT layer: LMFUSION_PEER_BAGEL=/path/to/a/clone of https://github.com/ByteDance-Seed/Bagel"""

from types import ModuleType

import torch
from torch import Tensor

from benchmarks.layer import Layer, LayerCase
from benchmarks.peers.loading import attention_for, fill, import_from, set_trained


def load() -> ModuleType:
    packages = ("modeling", "modeling.bagel", "modeling.qwen2", "modeling.cache_utils")
    url = "https://github.com/ByteDance-Seed/Bagel"
    return import_from("LMFUSION_PEER_BAGEL", url, packages, "modeling.bagel.qwen2_navit")


def bagel(case: LayerCase, freeze_und: bool = False, freezes_text: bool = False) -> Layer:
    """The layer with parameters of its own; it keeps rows in sequence order.

    freeze_und is BAGEL's own switch: it detaches activations, computes and keeps gradients of the text weights (zeros),
    and cuts the text loss off the image tower. freezes_text is requires_grad_(False), what its users would have to add.
    """
    module, shape = load(), case.shape
    config = module.Qwen2Config(
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, rms_norm_eps=case.text.eps, layer_module="Qwen2MoTDecoderLayer",
        qk_norm=True, freeze_und=freeze_und, pad_token_id=0,
    )  # fmt: skip
    with torch.device(case.device):
        layer = module.Qwen2MoTDecoderLayer(config, 0, attn_module=module.PackedAttentionMoT).to(case.dtype).train()
    fill(layer, case)
    set_trained(layer, freezes_text)
    attend, mask = attention_for(case)
    layout = case.layout
    text_rows, image_rows = layout.tower_to_sequence.long().split([layout.num_text, layout.num_image])
    rope = tuple(torch.cat([table, table], dim=-1).to(case.dtype) for table in case.rope)

    def forward(packed: Tensor) -> Tensor:
        if attend is not None:
            module.flex_attention = attend  # type: ignore[attr-defined]
        result: Tensor = layer(packed, [layout.num_tokens], mask, rope, text_rows, image_rows)
        return result

    return Layer(forward, list(layer.parameters()), "sequence")
