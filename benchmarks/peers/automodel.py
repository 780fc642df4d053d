"""NeMo Automodel's grouped MoT layer: LMFUSION_PEER_AUTOMODEL=/path/to/a/clone of
https://github.com/NVIDIA-NeMo/Automodel"""

from types import ModuleType

import torch
from torch import Tensor

from benchmarks.harness.layer import Layer, LayerCase
from benchmarks.peers.loading import attention_for, fill, import_from, set_trained


def load() -> ModuleType:
    inner = ("components", "components.attention", "components.models", "components.models.bagel", "shared")
    packages = ("nemo_automodel", *(f"nemo_automodel.{name}" for name in inner))
    url = "https://github.com/NVIDIA-NeMo/Automodel"
    module = "nemo_automodel.components.models.bagel.modeling_qwen2_packed"
    return import_from("LMFUSION_PEER_AUTOMODEL", url, packages, module)


def automodel(case: LayerCase, freeze_und: bool = False, freezes_text: bool = False) -> Layer:
    """The layer in its optimised mode: rows permuted once to [text | image], slices and torch.cat.

    On a GPU with its compiled SwiGLU and RoPE. The two switches are those of `peers.bagel.bagel`.
    """
    module, shape, layout = load(), case.shape, case.layout
    config = module.Qwen2Config(
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, rms_norm_eps=case.text.eps,
    )  # fmt: skip
    config.qk_norm, config.freeze_und = True, freeze_und
    is_gpu = case.device.type == "cuda"
    backend = module.BagelBackendConfig(mot_grouped=True, fused_swiglu=is_gpu, fused_rope=is_gpu)
    with torch.device(case.device):
        layer = module.Qwen2MoTDecoderLayer(config, 0, backend=backend).to(case.dtype).train()
    fill(layer, case)
    set_trained(layer, freezes_text)
    attend, mask = attention_for(case)
    order, to_sequence = layout.tower_to_sequence.long(), layout.sequence_to_tower.long()
    text_rows, image_rows = order.split([layout.num_text, layout.num_image])
    rope = tuple(torch.cat([table, table], dim=-1).to(case.dtype)[order] for table in case.rope)

    def forward(grouped: Tensor) -> Tensor:
        if attend is not None:
            module._flex_attention = attend  # type: ignore[attr-defined]
        result: Tensor = layer(
            grouped, [layout.num_tokens], mask, rope, text_rows, image_rows, mot_perm=order, mot_inv=to_sequence
        )
        return result

    return Layer(forward, list(layer.parameters()), "joined")
