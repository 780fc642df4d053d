"""The memory of a training step on one device, part by part.

It is calculated from configurations; nothing is loaded. On one device:

| part | bytes |
| --- | --- |
| weights | frozen ones in `train.dtype`; trained ones and the codec in float32 |
| gradients, EMA | 4 per trained parameter, each |
| optimizer | 8 per trained parameter (AdamW), or a little over 2 (8 bit) |
| weights cast | trained weights of the layers in `train.dtype`: the backward of each micro-batch reads them |
| activations | what autograd keeps of a micro-batch: in layers (see routed_block.py), around them, in the patch coder |
| working memory | what the step needs beyond these at its peak: gradients inside one layer, or of the logits |

With several ranks, weights, gradients, optimizer and EMA are divided along their first dimension. Instead of the casts
each rank then has gathered weights: those of two layers, one in use and one being gathered, and those outside layers,
with the gradients of one layer and of the rest. Every rank holds the whole codec and vision encoder.

Weights, gradients, optimizer, EMA, casts and activations are exact, except for a few bytes per token; working memory is
a sum of tensors counted by hand, and `RESERVED` is an assumption.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lmfusion.model.configuration import LMFusionConfig
from lmfusion.model.flops import CoderFields, SequenceCounts, coder_fields
from lmfusion.model.patch_coder import PatchCoderConfig, build_patch_coder
from lmfusion.planning.model_shape import ModelShape, WeightShape, count_parameters
from lmfusion.training.optimizer import state_block

RESERVED = 4 * 2**30
"""Assumed: driver and CUDA context, workspaces of libraries, and memory that the allocator cannot use."""


@dataclass(frozen=True)
class Setup:
    """The settings of a run that its memory depends on."""

    frozen_text: bool = True
    dtype: torch.dtype = torch.bfloat16
    recompute: str = "none"
    optimizer: str = "adamw"
    has_ema: bool = True
    num_ranks: int = 1
    device: str = "cuda"
    """"cuda" or "cpu": a CPU computes logits of labelled tokens only."""


def memory_by_part(shape: ModelShape, counts: SequenceCounts, setup: Setup) -> dict[str, int]:
    """Bytes on one device while it trains on micro-batches of `counts`, by part."""
    trained = shape.trained(setup.frozen_text)
    num_trained = sum(weight.on_largest_rank(setup.num_ranks) for weight in trained)
    frozen = sum(weight.on_largest_rank(setup.num_ranks) for weight in shape.frozen(setup.frozen_text))
    parts = {
        "frozen weights": frozen * setup.dtype.itemsize,
        "trained weights": 4 * num_trained,
        "codec": 4 * shape.codec.num_parameters,
        "vision encoder": shape.num_vision_parameters * setup.dtype.itemsize,
        "gradients": 4 * num_trained,
        "optimizer": sum(_optimizer_bytes(weight, setup) for weight in trained),
        "EMA": 4 * num_trained if setup.has_ema else 0,
        **activation_bytes(shape, counts, setup),
    }
    if setup.num_ranks == 1:
        parts["weights cast"] = cast_bytes(shape, setup)
    else:
        parts["gathered weights and gradients"] = _gathered_bytes(shape, setup)
    parts["working memory"] = _working_bytes(shape, counts, setup)
    return {name: int(size) for name, size in parts.items() if size}


def checkpoint_bytes(shape: ModelShape, setup: Setup) -> int:
    """Host memory of a rank while a checkpoint is written: trained weights, optimizer and EMA."""
    copies = 2 if setup.has_ema else 1
    return sum(
        4 * copies * weight.on_largest_rank(setup.num_ranks) + _optimizer_bytes(weight, setup)
        for weight in shape.trained(setup.frozen_text)
    )


def activation_bytes(shape: ModelShape, counts: SequenceCounts, setup: Setup) -> dict[str, float]:
    """What autograd keeps of one micro-batch between its forward and its backward, without weights."""
    config = shape.config
    text, e = config.text_config, setup.dtype.itemsize
    num_text = counts.num_constant + counts.num_live
    constant = 2 * text.num_key_value_heads * config.head_dim * e + (0 if setup.recompute == "layer" else 8)
    layer = counts.num_constant * constant + sum(
        num_tokens * active_token_bytes(config, width, intermediate_size, setup.dtype, setup.recompute)
        for num_tokens, width, intermediate_size in _active_tokens(config, counts)
    )
    final_norm = e * (num_text * text.hidden_size + counts.num_image * config.image_hidden_size) + 4 * counts.num_tokens
    num_head_tokens = _num_head_tokens(counts, setup.device)
    head_input = e * text.hidden_size * (num_head_tokens if setup.device == "cpu" else num_text)
    logits = 4 * num_head_tokens * (text.vocab_size + 2)
    boi_targets = counts.num_boi_targets * (e * text.hidden_size + 21)
    encode, decode = patch_coder_bytes(
        coder_fields(config.image.patch_coder), config.image_hidden_size, counts.latent_shape
    )
    return {
        "activations, patch coder in": counts.num_images * encode,
        "activations, layers": text.num_hidden_layers * layer + 4 * counts.num_tokens * config.head_dim + 9 * num_text,
        "activations, LM head": final_norm + head_input + logits + boi_targets,
        "activations, patch coder out": counts.num_target_images * decode,
    }


def _active_tokens(config: LMFusionConfig, counts: SequenceCounts) -> tuple[tuple[float, int, int], ...]:
    """For each tower: how many of its tokens have a backward, its width, and that of its feed-forward network."""
    text = config.text_config
    return (
        (counts.num_live, text.hidden_size, text.intermediate_size),
        (counts.num_image, config.image_hidden_size, config.image_intermediate_size),
    )


def _num_head_tokens(counts: SequenceCounts, device: str) -> float:
    """Tokens that get logits. Selecting only the labelled ones would make the host wait for the GPU."""
    if not counts.num_labels:
        return 0
    return counts.num_labels if device == "cpu" else counts.num_live


def active_token_bytes(
    config: LMFusionConfig, width: int, intermediate_size: int, dtype: torch.dtype, recompute: str
) -> int:
    """What one layer keeps of a token that has a backward; see lmfusion_kernels/block/routed_block.py."""
    if recompute == "layer":
        return width * dtype.itemsize
    text = config.text_config
    q_width, kv_width = (heads * config.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
    gate_up = 2 * intermediate_size if recompute == "none" else 0
    qkv = q_width + 2 * kv_width if text.model_type == "qwen3" else 0  # with QK norm
    values = 2 * width + 2 * q_width + 2 * kv_width + gate_up + qkv
    return values * dtype.itemsize + 4 * text.num_attention_heads + 8


def cast_bytes(shape: ModelShape, setup: Setup) -> int:
    """Copies of trained float32 weights in the activations' dtype. The patch coder and the embeddings have none."""
    if setup.dtype == torch.float32:
        return 0
    # Without an LM head of its own, the embedding is the head too, and is cast
    has_head = any(weight.name.startswith("text.lm_head.") for weight in shape.weights)
    uncast = ("image.patch_coder.", "image.marker_embedding", *["text.embed_tokens."] * has_head)
    trained = shape.trained(setup.frozen_text)
    return setup.dtype.itemsize * count_parameters([weight for weight in trained if not weight.name.startswith(uncast)])


def _optimizer_bytes(weight: WeightShape, setup: Setup) -> int:
    num_parameters = weight.on_largest_rank(setup.num_ranks)
    block = state_block(torch.Size(weight.shape)) if setup.optimizer == "adamw_8bit" else 0
    if not block:
        return 8 * num_parameters
    return 2 * (num_parameters + 4 * num_parameters // block + 4 * 256)  # codes, scales, and the tables of code values


def _first_layer(weights: list[WeightShape]) -> list[WeightShape]:
    """The weights of the first layer of both towers."""
    return [weight for weight in weights if weight.name.startswith(("text.layers.0.", "image.layers.0."))]


def _gathered_bytes(shape: ModelShape, setup: Setup) -> int:
    """Beyond a rank's own shards: two layers, the weights outside layers, and gradients that are being reduced.

    A layer's gradients exist in `dtype` while they are reduced in float32 and the next layer's are computed.
    """
    e, trained, frozen = setup.dtype.itemsize, shape.trained(setup.frozen_text), shape.frozen(setup.frozen_text)
    num_layer, num_trained_layer = (
        count_parameters(_first_layer(shape.weights)),
        count_parameters(_first_layer(trained)),
    )
    num_trained_root = count_parameters([weight for weight in trained if not weight.is_in_layer])
    num_frozen_root = count_parameters([weight for weight in frozen if not weight.is_in_layer])
    weights = e * (2 * num_layer + num_frozen_root) + 4 * num_trained_root
    return weights + (e + 4) * num_trained_layer + 4 * num_trained_root


def _working_bytes(shape: ModelShape, counts: SequenceCounts, setup: Setup) -> float:
    """What the largest of three peaks needs beyond all activations: the loss, a layer, the embedding's gradient."""
    config = shape.config
    text, e = config.text_config, setup.dtype.itemsize
    first, layers, head, second = activation_bytes(shape, counts, setup).values()
    num_logits = _num_head_tokens(counts, setup.device) * (text.vocab_size + 2)
    loss = head + second + 8 * num_logits  # the gradients of logits and of their logarithms, float32
    q_width, kv_width = (heads * config.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
    layer: float = e * count_parameters(_first_layer(shape.trained(setup.frozen_text)))
    for num_tokens, width, intermediate_size in _active_tokens(config, counts):
        gradients = (4 * intermediate_size + 5 * width + 3 * q_width + 4 * kv_width) * e
        kept, needed = (
            active_token_bytes(config, width, intermediate_size, setup.dtype, mode)
            for mode in (setup.recompute, "none")
        )
        layer += num_tokens * (gradients + needed - kept)
    end = 0.0
    if not setup.frozen_text:
        vocabulary = 4 * text.vocab_size * text.hidden_size
        head_gradient = vocabulary + (vocabulary // 2 if e == 2 else 0)  # in the product's dtype, then in float32
        loss = max(loss, head + second + (e - 4) * num_logits + head_gradient)
        layer += vocabulary  # if head and embedding are tied, the head's gradient waits for the embedding's
        end = (3 if text.tie_word_embeddings and setup.dtype == torch.float32 else 2) * vocabulary
    return max(first + layers + max(loss, layer), first + end) - (first + layers + head + second)


@lru_cache
def patch_coder_bytes(coder: CoderFields, width: int, latent_shape: tuple[int, int, int]) -> tuple[int, int]:
    """What autograd keeps of each half of the patch coder for an image of `latent_shape` (C, h, w), without weights."""
    with torch.device("meta"):
        module = build_patch_coder(PatchCoderConfig(*coder), latent_shape[0], width)
        latents, timesteps = torch.empty(1, *latent_shape), torch.empty(1, dtype=torch.int64)

        def both_halves() -> Tensor:
            tokens, skip = module.encode(latents, timesteps)
            return module.decode(tokens.detach().clone().requires_grad_(), timesteps, skip)

        first = saved_bytes(lambda: module.encode(latents, timesteps), module.parameters())
        return first, saved_bytes(both_halves, module.parameters()) - first


def saved_bytes(call: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps of `call()`, without those of `known` tensors."""
    storages = {}
    of_known = {tensor.untyped_storage()._cdata for tensor in known}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in of_known:
            storages[storage._cdata] = storage  # kept alive, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(storage.nbytes() for storage in storages.values())
