"""The text and image towers: module trees with Llama's names, and how their weights are initialised.

`lmfusion_kernels` computes a layer of both towers at a time. The text tower's layer calls it, and gets the weights of
the image tower's layer beside it: both are in use throughout one `forward`, so that sharded weights can be gathered and
freed together.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import lmfusion_kernels as lk
from lmfusion.conversion.model_limits import head_dim_of
from lmfusion.model.configuration import LMFusionConfig
from lmfusion.model.patch_coder import build_patch_coder
from lmfusion_kernels.block.weights import Rope, TowerRows
from lmfusion_kernels.ops.lora import is_adapted

L = TypeVar("L", bound=lk.TowerLayer)


class TextLayer(lk.TowerLayer):
    """A layer of the text tower, which computes the layer of both towers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.block: Callable[..., TowerRows] = lk.routed_block
        """What computes the layer: `routed_block`, or the same compiled."""

    def forward(
        self,
        x: tuple[Tensor, Tensor],
        layout: lk.TokenLayout,
        rope: Rope,
        image_layer: "ImageLayer | None" = None,
        kv_cache: tuple[Tensor, Tensor] | None = None,
        recompute: str = "none",
    ) -> TowerRows:
        """Hidden states of both towers ([num_text, d_text], [num_image, d_image]) after the layer.

        image_layer: the image tower's, beside this one; None: image tokens use the text tower's weights too. The other
        parameters are those of `lk.routed_block`.
        """
        text = self.weights(x[0].dtype)
        image = text if image_layer is None else image_layer(text)
        return self.block(x, layout, text, image, rope, kv_cache=kv_cache, recompute=recompute)

    def projection(self, linear: nn.Module, dtype: torch.dtype) -> Tensor:
        weight, bias = _base_weight(linear), linear.bias
        if isinstance(bias, Tensor) and bias.requires_grad and not weight.requires_grad:
            raise ValueError(
                "the text tower must be frozen or trained as a whole, but its biases are trainable and its weights are "
                "not, as with peft's bias='all'; set bias='none' or 'lora_only'"
            )
        return weight.to(dtype)


class ImageLayer(lk.TowerLayer):
    """A layer of the image tower."""

    def forward(self, text: lk.BlockWeights) -> lk.BlockWeights:
        """Its weights, in the dtype of the `text` tower's layer."""
        return self.weights(text.qkv_proj.dtype)


class FeedForwardLayer(ImageLayer):
    """A layer's own feed-forward network and its norm; the attention is the text tower's (separation "shallow")."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.input_layernorm, self.self_attn

    def forward(self, text: lk.BlockWeights) -> lk.BlockWeights:
        dtype = text.qkv_proj.dtype
        return replace(
            text,
            post_attention_layernorm=self.post_attention_layernorm.weight.to(dtype),
            gate_up_proj=self.projection(self.mlp.gate_up_proj, dtype),
            down_proj=self.projection(self.mlp.down_proj, dtype),
        )


class TextTower(nn.Module):
    """The base LLM: embeddings, layers, final norm and head."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(
            _tower_layer(TextLayer, config, width, config.intermediate_size) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(width, config.vocab_size, bias=False)
        # Not a buffer: the frequencies stay float32 whatever the weights are converted to
        self.inv_freq, self.attention_scaling = rope_frequencies(config)

    @property
    def embedding_weight(self) -> Tensor:
        """The embedding, [V, d]."""
        return _base_weight(self.embed_tokens)

    @property
    def head_weight(self) -> Tensor:
        """The LM head, [V, d], which may be the embedding."""
        return self.embedding_weight if self.lm_head is None else _base_weight(self.lm_head)

    def rope(self, position: Tensor) -> Rope:
        """cos and sin of every token's angles, from its position (int32 [N], sequence order)."""
        self.inv_freq = self.inv_freq.to(position.device)
        return lk.rope_tables(position, self.inv_freq, self.attention_scaling)


class ImageTower(nn.Module):
    """Layers beside the text tower's, a final norm, the patch coder, and the embeddings and head of BOI and EOI."""

    def __init__(self, config: LMFusionConfig, latent_channels: int) -> None:
        super().__init__()
        text, width = config.text_config, config.image_hidden_size
        kind = FeedForwardLayer if config.image.separation == "shallow" else ImageLayer
        num_layers = 0 if config.image.separation == "none" else text.num_hidden_layers
        self.layers = nn.ModuleList(
            _tower_layer(kind, text, width, config.image_intermediate_size) for _ in range(num_layers)
        )
        """One beside each text layer; empty where every layer is shared (separation "none")."""
        self.norm = nn.RMSNorm(width, eps=text.rms_norm_eps)
        self.patch_coder = build_patch_coder(config.image.patch_coder, latent_channels, width)
        self.marker_embedding = nn.Parameter(torch.empty(2, text.hidden_size))
        """Embeddings of BOI and EOI, which the text tower processes."""
        self.marker_head = nn.Parameter(torch.empty(2, text.hidden_size))
        """Rows of BOI and EOI beside the LM head."""

    @torch.no_grad()
    def initialize(self, text: TextTower) -> None:
        """Start from `text`: weights of the same shape are copied, others are random as Llama's are.

        Embeddings and head of the markers start near the mean of the vocabulary's. The patch coder is left as it is.
        Random numbers come from torch's global generator.
        """
        sources = dict(text.named_parameters())
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, lk.TowerLayer)
            of_layer = {name: sources[f"layers.{i}.{name}"] for name, _ in layer.named_parameters()}
            if any(parameter.shape != of_layer[name].shape for name, parameter in layer.named_parameters()):
                layer.initialize(len(self.layers))
            for name, parameter in layer.named_parameters():
                if parameter.shape == of_layer[name].shape:
                    parameter.copy_(of_layer[name])
        if self.norm.weight.shape == text.norm.weight.shape:
            self.norm.weight.copy_(text.norm.weight)
        else:
            self.norm.weight.fill_(1.0)
        for marker, vocabulary in (
            (self.marker_embedding, text.embedding_weight),
            (self.marker_head, text.head_weight),
        ):
            mean, spread = vocabulary.float().mean(0), 0.1 * vocabulary.float().std()
            marker.copy_(mean + spread * torch.randn(marker.shape, device=marker.device))


def _tower_layer(kind: type[L], config: PreTrainedConfig, width: int, intermediate_size: int) -> L:
    """A layer with the heads of the LLM `config`, and the biases and norms that its architecture has."""
    return kind(
        width,
        intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        head_dim=head_dim_of(config),
        qkv_bias=config.model_type == "qwen2",
        qk_norm=config.model_type == "qwen3",
        eps=config.rms_norm_eps,
    )


def _base_weight(module: nn.Module) -> Tensor:
    """The weight of a module of the text tower."""
    if is_adapted(module):
        raise ValueError(
            "LoRA is attached to the text tower, which must stay the base LLM; attach it to the image tower: "
            r"target_modules=r'image\.layers\..*\.(qkv_proj|o_proj|gate_up_proj|down_proj)'"
        )
    assert isinstance(module.weight, Tensor)
    return module.weight


def rope_frequencies(config: PreTrainedConfig) -> tuple[Tensor, float]:
    """Angular frequencies, float32 [D/2] on the CPU, and the factor of cos and sin, with the config's rope scaling."""
    with torch.device("cpu"):  # real values even while the model is built on the meta device
        rope = config.rope_parameters
        if rope["rope_type"] != "default":
            return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
        head_dim = head_dim_of(config)
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim), 1.0
