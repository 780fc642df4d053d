"""Gives a Hugging Face Llama a second tower: every decoder layer becomes an `lk.RoutedBlock`.

    python examples/llama_block.py                                  # a small random Llama
    python examples/llama_block.py path/to/a/llama --dtype bfloat16 --device cuda

The text tower has the layer's own weights, frozen; the image tower starts as a copy of them. Three checks: the logits
of text are those of the original model, a batch with an image trains only the image tower, and after a step of that
training the logits of text have not changed by a bit.
"""

import argparse
import copy
import sys

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lmfusion_kernels as lk

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
"""Largest difference of the logits, relative to the largest logit: sums are taken in another order."""


class TwoTowerLayer(nn.Module):
    """Replaces a LlamaDecoderLayer. The model passes `layout` and `rope` on to every layer."""

    def __init__(self, layer: nn.Module, config: LlamaConfig) -> None:
        super().__init__()
        with torch.device("meta"):  # the weights follow
            self.block = lk.RoutedBlock(
                config.hidden_size,
                config.intermediate_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
                eps=config.rms_norm_eps,
                frozen_text=True,
            )
        weights = tower_weights(layer.state_dict())
        self.block.text.load_state_dict(weights, assign=True)
        self.block.image.load_state_dict(copy.deepcopy(weights), assign=True)
        self.block.text.requires_grad_(False)
        self.block.image.requires_grad_(True)

    def forward(self, hidden_states: Tensor, layout: lk.TokenLayout, rope: tuple, **_: object) -> Tensor:
        """hidden_states: [B, T, d]; the layout has one document for each sequence of the batch."""
        rows = self.block(hidden_states.flatten(0, 1), layout, rope, order="sequence")
        return rows.view_as(hidden_states)


def tower_weights(llama: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Llama layer's weights under the names of `lk.TowerLayer`, which stacks q, k, v and gate, up."""
    stacked = {
        "self_attn.qkv_proj.weight": [f"self_attn.{name}_proj.weight" for name in "qkv"],
        "mlp.gate_up_proj.weight": [f"mlp.{name}_proj.weight" for name in ("gate", "up")],
    }
    parts = {name for names in stacked.values() for name in names}
    weights = {name: tensor for name, tensor in llama.items() if name not in parts}
    return weights | {name: torch.cat([llama[part] for part in parts]) for name, parts in stacked.items()}


def add_image_tower(llama: LlamaForCausalLM) -> None:
    """Turn every decoder layer of `llama` into a two-tower one, in place; everything outside the layers is frozen."""
    config = llama.config
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise ValueError(
            f"this example knows Llama without biases, not {config.model_type}; see lk.RoutedBlock's options"
        )
    llama.requires_grad_(False)
    llama.model.layers = nn.ModuleList(TwoTowerLayer(layer, config) for layer in llama.model.layers)


def routing(llama: LlamaForCausalLM, documents: list[list[tuple[str, int]]]) -> dict[str, object]:
    """The two arguments that every two-tower layer needs besides the hidden states."""
    layout = lk.TokenLayout.from_spans(documents, frozen_text=True, device=llama.device)
    rotary = exact_rotary(llama)
    return {"layout": layout, "rope": lk.rope_tables(layout.position, rotary.inv_freq, rotary.attention_scaling)}


def exact_rotary(llama: LlamaForCausalLM) -> nn.Module:
    """The model's rotary embedding with frequencies in float32, whatever `llama.to(dtype)` has made of its buffer."""
    return type(llama.model.rotary_emb)(llama.config).to(llama.device)


def text_logits(llama: LlamaForCausalLM, input_ids: Tensor) -> Tensor:
    """Logits [B, T, V] of pure text, by the two-tower model."""
    documents = [[("text", input_ids.shape[1])]] * input_ids.shape[0]
    with torch.no_grad():
        return llama(input_ids=input_ids, use_cache=False, **routing(llama, documents)).logits


def caption_loss(llama: LlamaForCausalLM, caption_ids: Tensor, num_image_rows: int) -> Tensor:
    """Loss of each caption [B, T] after an image of random rows, where a model would put its encoded patches."""
    text = llama.get_input_embeddings()(caption_ids)
    image = torch.randn(len(text), num_image_rows, text.shape[2], device=text.device).to(text.dtype) * text.std()
    documents = [[("image", num_image_rows), ("text", caption_ids.shape[1])]] * len(text)
    embeddings = torch.cat([image, text], dim=1)
    logits = llama(inputs_embeds=embeddings, use_cache=False, **routing(llama, documents)).logits
    predictions = logits[:, num_image_rows - 1 : -1]  # the last image row predicts the first word
    return nn.functional.cross_entropy(predictions.flatten(0, 1).float(), caption_ids.flatten())


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_hidden_layers=3, **sizes))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or name of a Llama (default: a small random one)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=[str(d).removeprefix("torch.") for d in TOLERANCE])
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    llama = small_llama() if options.model is None else AutoModelForCausalLM.from_pretrained(options.model)
    llama = llama.to(options.device, dtype).eval()
    llama.model.rotary_emb = exact_rotary(llama)
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, llama.config.vocab_size, (2, 48), generator=generator).to(options.device)

    with torch.no_grad():
        expected = llama(input_ids=input_ids, use_cache=False).logits
    add_image_tower(llama)
    logits = text_logits(llama, input_ids)
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    are_equal = difference <= TOLERANCE[dtype]
    how = "equal to the bit" if torch.equal(logits, expected) else f"differ by {difference:.1e} of the largest"
    print(f"text-only logits: {how} (allowed: {TOLERANCE[dtype]:.0e})")

    trained = [p for p in llama.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    loss = caption_loss(llama, input_ids[:, :16], num_image_rows=64)
    loss.backward()
    optimizer.step()
    num_trained, num_all = (sum(p.numel() for p in some) for some in (trained, llama.parameters()))
    has_learned = all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained)
    print(f"one step on captions of images: loss {loss.item():.3f}, {num_trained:,} of {num_all:,} parameters trained")
    is_kept = torch.equal(text_logits(llama, input_ids), logits)
    print(f"text-only logits after it: {'the same bits' if is_kept else 'CHANGED'}")
    return 0 if are_equal and has_learned and is_kept else 1


if __name__ == "__main__":
    sys.exit(main())
