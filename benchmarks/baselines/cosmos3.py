"""diffusers' two-tower layer `Cosmos3VLTextMoTDecoderLayer`, filled with the weights of a `RoutedBlock`."""

import torch
from diffusers.models.transformers.transformer_cosmos3 import Cosmos3VLTextMoTDecoderLayer
from torch import Tensor, nn

from lmfusion_kernels import RoutedBlock, TokenLayout
from lmfusion_kernels.weights import Rope


def make_cosmos3_layer(block: RoutedBlock, num_heads: int, num_kv_heads: int, head_dim: int) -> nn.Module:
    """The peer's layer with the same weights. It takes one document: text, then one image."""
    text, image = block.text, block.image
    d, intermediate = text.mlp.down_proj.weight.shape
    layer = Cosmos3VLTextMoTDecoderLayer(d, head_dim, num_heads, num_kv_heads, intermediate, False, text.eps)
    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    attention = layer.self_attn
    modules = (
        (text, (attention.to_q, attention.to_k, attention.to_v), attention.to_out, (attention.norm_q, attention.norm_k),
         layer.mlp, layer.input_layernorm, layer.post_attention_layernorm),
        (image, (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj), attention.to_add_out,
         (attention.norm_added_q, attention.norm_added_k), layer.mlp_moe_gen, layer.input_layernorm_moe_gen,
         layer.post_attention_layernorm_moe_gen),
    )  # fmt: skip
    with torch.no_grad():
        for tower, qkv, out, norms, mlp, norm_in, norm_out in modules:
            for module, weight in zip(qkv, tower.self_attn.qkv_proj.weight.split(sizes), strict=True):
                module.weight.copy_(weight)
            out.weight.copy_(tower.self_attn.o_proj.weight)
            norms[0].weight.copy_(tower.self_attn.q_norm.weight)
            norms[1].weight.copy_(tower.self_attn.k_norm.weight)
            gate, up = tower.mlp.gate_up_proj.weight.chunk(2)
            mlp.gate_proj.weight.copy_(gate)
            mlp.up_proj.weight.copy_(up)
            mlp.down_proj.weight.copy_(tower.mlp.down_proj.weight)
            norm_in.weight.copy_(tower.input_layernorm.weight)
            norm_out.weight.copy_(tower.post_attention_layernorm.weight)
    return layer.to(text.mlp.down_proj.weight.dtype)


def text_half(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters of the peer's text tower."""
    return [p for name, p in layer.named_parameters() if "moe_gen" not in name and "add" not in name]


def cosmos3_rope(rope: Rope, layout: TokenLayout, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Our tables in the peer's form: cos and sin of the text rows, then of the image rows, both halves of a head."""
    cos, sin = (torch.cat([table, table], dim=-1).to(dtype) for table in rope)
    return cos[: layout.num_text], sin[: layout.num_text], cos[layout.num_text :], sin[layout.num_text :]
