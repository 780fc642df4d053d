"""diffusers' two-tower layer `Cosmos3VLTextMoTDecoderLayer`, filled with the weights of a case.

It supports one document, text first and then one image, always with QK norms, without packing or interleaving.
"""

import torch
from torch import Tensor, nn

from benchmarks.harness.compare import UnavailableError
from benchmarks.harness.layer import Layer, LayerCase


def cosmos3(case: LayerCase) -> Layer:
    """The layer with its own parameters; its text half is frozen if the case's is."""
    try:
        from diffusers.models.transformers.transformer_cosmos3 import Cosmos3VLTextMoTDecoderLayer
    except ImportError as error:
        raise UnavailableError(
            f"diffusers' Cosmos3 layer is not there ({error}): pip install 'diffusers>=0.40'"
        ) from None
    shape, layout = case.shape, case.layout
    with torch.device(case.device):
        layer = Cosmos3VLTextMoTDecoderLayer(
            shape.hidden_size, shape.head_dim, shape.num_heads, shape.num_kv_heads, shape.intermediate_size, False,
            case.text.eps,
        ).to(case.dtype)  # fmt: skip
    _fill(layer, case)
    for name, parameter in layer.named_parameters():
        tower = case.image if "moe_gen" in name or "add" in name else case.text
        parameter.requires_grad_(tower.qkv_proj.requires_grad)
    cos, sin = (torch.cat([table, table], dim=-1).to(case.dtype) for table in case.rope)
    num_text = layout.num_text
    rope = cos[:num_text], sin[:num_text], cos[num_text:], sin[num_text:]

    def forward(x_text: Tensor, x_image: Tensor) -> tuple[Tensor, Tensor]:
        text, image = layer(x_text, x_image, rope)
        return text, image

    return Layer(forward, list(layer.parameters()))


@torch.no_grad()
def _fill(layer: nn.Module, case: LayerCase) -> None:
    shape = case.shape
    sizes = [shape.num_heads * shape.head_dim] + 2 * [shape.num_kv_heads * shape.head_dim]
    attention = layer.self_attn
    modules = (
        (case.text, (attention.to_q, attention.to_k, attention.to_v), attention.to_out,
         (attention.norm_q, attention.norm_k), layer.mlp, layer.input_layernorm, layer.post_attention_layernorm),
        (case.image, (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj), attention.to_add_out,
         (attention.norm_added_q, attention.norm_added_k), layer.mlp_moe_gen, layer.input_layernorm_moe_gen,
         layer.post_attention_layernorm_moe_gen),
    )  # fmt: skip
    for w, qkv, out, norms, mlp, norm_in, norm_out in modules:
        for module, weight in zip(qkv, w.qkv_proj.split(sizes), strict=True):
            module.weight.copy_(weight)
        for module, weight in zip(norms, (w.q_norm, w.k_norm), strict=True):
            module.weight.copy_(weight)
        gate, up = w.gate_up_proj.chunk(2)
        for module, weight in (
            (out, w.o_proj), (mlp.gate_proj, gate), (mlp.up_proj, up), (mlp.down_proj, w.down_proj),
            (norm_in, w.input_layernorm), (norm_out, w.post_attention_layernorm),
        ):  # fmt: skip
            module.weight.copy_(weight)
