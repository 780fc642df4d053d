"""transformers' LlamaDecoderLayer with the text tower's weights on all tokens: the floor of "no routing, no images".

One tower, causal attention in one document, no QK norm: it computes less. On one text document the results must be
equal, which `check_equal` asserts before the floor is timed.
"""

import torch
from torch import Tensor

import lmfusion_kernels as lk
from benchmarks.harness.compare import UnavailableError, difference
from benchmarks.harness.layer import Layer, LayerCase


def dense_llama(case: LayerCase) -> Layer:
    """The layer; it takes all rows as one causal document, the text rows first."""
    try:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    except ImportError as error:
        raise UnavailableError(
            f"transformers' LlamaDecoderLayer is not there ({error}): pip install transformers"
        ) from None
    shape, text = case.shape, case.text
    config = LlamaConfig(
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, num_hidden_layers=1,
        num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim,
        rms_norm_eps=text.eps, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, 0)
    sizes = [shape.num_heads * shape.head_dim] + 2 * [shape.num_kv_heads * shape.head_dim]
    q, k, v = text.qkv_proj.detach().split(sizes)
    gate, up = text.gate_up_proj.detach().chunk(2)
    tensors = {
        "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": text.o_proj,
        "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": text.down_proj,
        "input_layernorm": text.input_layernorm, "post_attention_layernorm": text.post_attention_layernorm,
    }  # fmt: skip
    layer.load_state_dict({f"{name}.weight": tensor.detach() for name, tensor in tensors.items()}, assign=True)
    layer.requires_grad_(text.qkv_proj.requires_grad or case.image.qkv_proj.requires_grad)
    position = torch.arange(case.layout.num_tokens, device=case.device)
    inv_freq = 1e5 ** -torch.linspace(0, 1, shape.head_dim // 2, device=case.device)
    cos, sin = (torch.cat([t, t], dim=-1)[None].to(case.dtype) for t in lk.rope_tables(position, inv_freq))

    def run(rows: Tensor) -> Tensor:
        n = rows.shape[0]
        result = layer(rows[None], position_embeddings=(cos[:, :n], sin[:, :n]), attention_mask=None)
        return (result[0] if isinstance(result, tuple) else result)[0]

    if not shape.qk_norm and not shape.qkv_bias:
        check_equal(case, run)

    return Layer(run, list(layer.parameters()), "joined")


@torch.no_grad()
def check_equal(case: LayerCase, run) -> None:  # type: ignore[no-untyped-def]
    """Raise ArithmeticError unless the dense layer and the reference agree on a document of text."""
    num_rows = min(64, case.layout.num_tokens)
    layout = lk.TokenLayout.from_spans([[("text", num_rows)]], device=case.device)
    inv_freq = 1e5 ** -torch.linspace(0, 1, case.shape.head_dim // 2, device=case.device)
    rope = lk.rope_tables(layout.position, inv_freq)
    x = torch.randn(num_rows, case.shape.hidden_size, device=case.device).to(case.dtype)
    expected = lk.reference.routed_block(x, layout, case.text, case.image, rope)
    assert isinstance(expected, Tensor)
    if why := difference([run(x)], [expected], case.dtype):
        raise ArithmeticError(f"on one text document, {why}")
