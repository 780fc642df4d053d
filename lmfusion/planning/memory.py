"""How much memory does a training step need on one device, part by part?

Calculated from configurations, nothing is loaded. On one device:

| part | bytes |
| --- | --- |
| weights | what is frozen in `train.dtype`; what is trained, and the codec, in float32 |
| gradients, EMA | 4 a trained parameter, each |
| optimizer | 8 a trained parameter (AdamW), or 2 and a little (8 bit) |
| weights cast | trained weights of the layers in `train.dtype`: each row's backward reads them |
| activations | what autograd keeps of one row: in layers (lmfusion_kernels/block/routed_block.py), around them, in the patch coder |
| working memory | what the largest moment needs beyond these: the gradients in one layer, or of the logits |

On several ranks weights, gradients, optimizer and EMA are cut along their first dimension. In place of the casts each
rank then has gathered weights: those of two layers, one in use and one on its way, and what belongs to no layer, with
the gradients of one layer and of the rest. Codec and vision encoder are whole on every rank.

Weights, gradients, optimizer, EMA, casts and activations are exact but for a few bytes a row; working memory is a sum
of tensors by hand, and `RESERVED` an assumption.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from lmfusion.model.configuration import LMFusionConfig
from lmfusion.model.flops import CoderFields, SequenceCounts, coder_fields
from lmfusion.model.patch_coder import PatchCoderConfig, build_patch_coder
from lmfusion.model.towers import ImageTower, TextTower
from lmfusion.training.optimizer import state_block

RESERVED = 4 * 2**30
"""Assumed: driver and CUDA context, libraries' workspaces, what the allocator cannot use."""


@dataclass(frozen=True)
class Setup:
    """What of a run's configuration decides its memory."""

    frozen_text: bool = True
    dtype: torch.dtype = torch.bfloat16
    recompute: str = "none"
    optimizer: str = "adamw"
    has_ema: bool = True
    num_ranks: int = 1
    device: str = "cuda"
    """"cuda" or "cpu": a CPU makes logits of labelled rows alone."""


@dataclass(frozen=True)
class Size:
    """Parameters, and how many of them the largest rank holds."""

    name: str
    shape: tuple[int, ...]
    is_trained: bool

    @property
    def num_parameters(self) -> int:
        return math.prod(self.shape)

    def part(self, num_ranks: int) -> int:
        """Parameters on the rank that holds most."""
        return -(-self.shape[0] // num_ranks) * math.prod(self.shape[1:])


def parameters(config: LMFusionConfig, latent_channels: int, frozen_text: bool = True) -> list[Size]:
    """Every parameter of both towers by its name in the model."""
    with torch.device("meta"):
        towers = nn.ModuleDict({"text": TextTower(config.text_config), "image": ImageTower(config, latent_channels)})
    return [
        Size(name, tuple(parameter.shape), not (frozen_text and name.startswith("text.")))
        for name, parameter in towers.named_parameters()
    ]


def memory_by_part(
    config: LMFusionConfig,
    sizes: list[Size],
    rows: SequenceCounts,
    setup: Setup,
    codec_parameters: int = 0,
    vision_parameters: int = 0,
) -> dict[str, int]:
    """Bytes on one device while it trains on packed rows like `rows`, by part.

    sizes: `parameters` of the model, frozen as `setup` says. codec_parameters, vision_parameters: how many the codec
    has, and what a vision-language model sees with.
    """
    trained = [size for size in sizes if size.is_trained]
    num_trained = sum(size.part(setup.num_ranks) for size in trained)
    frozen = sum(size.part(setup.num_ranks) for size in sizes if not size.is_trained)
    parts = {
        "frozen weights": frozen * setup.dtype.itemsize,
        "trained weights": 4 * num_trained,
        "codec": 4 * codec_parameters,
        "vision encoder": vision_parameters * setup.dtype.itemsize,
        "gradients": 4 * num_trained,
        "optimizer": sum(_optimizer_bytes(size, setup) for size in trained),
        "EMA": 4 * num_trained if setup.has_ema else 0,
        **activation_bytes(config, rows, setup),
    }
    if setup.num_ranks == 1:
        parts["weights cast"] = cast_bytes(sizes, setup.dtype)
    else:
        parts["gathered weights and gradients"] = _gathered_bytes(sizes, setup.dtype)
    parts["working memory"] = _working_bytes(config, rows, sizes, setup)
    return {name: int(size) for name, size in parts.items() if size}


def checkpoint_bytes(sizes: list[Size], setup: Setup) -> int:
    """Host memory of a rank while a checkpoint is written: trained weights, optimizer and EMA."""
    copies = 2 if setup.has_ema else 1
    trained = [size for size in sizes if size.is_trained]
    return sum(4 * copies * size.part(setup.num_ranks) + _optimizer_bytes(size, setup) for size in trained)


def activation_bytes(config: LMFusionConfig, rows: SequenceCounts, setup: Setup) -> dict[str, float]:
    """What autograd keeps of one row between its forward and its backward, weights aside."""
    text, e = config.text_config, setup.dtype.itemsize
    num_text = rows.num_constant + rows.num_live
    constant = 2 * text.num_key_value_heads * config.head_dim * e + (0 if setup.recompute == "layer" else 8)
    layer = rows.num_constant * constant + sum(
        num_rows * active_row_bytes(config, width, intermediate_size, setup.dtype, setup.recompute)
        for num_rows, width, intermediate_size in _active_rows(config, rows)
    )
    final_norm = e * (num_text * text.hidden_size + rows.num_image * config.image_hidden_size) + 4 * rows.num_tokens
    head_rows = _head_rows(rows, setup.device)
    head_input = e * text.hidden_size * (head_rows if setup.device == "cpu" else num_text)
    logits = 4 * head_rows * (text.vocab_size + 2)
    decisions = rows.num_boi_targets * (e * text.hidden_size + 21)
    encode, decode = patch_coder_bytes(
        coder_fields(config.image.patch_coder), config.image_hidden_size, rows.latent_shape
    )
    return {
        "activations, patch coder in": rows.num_images * encode,
        "activations, layers": text.num_hidden_layers * layer + 4 * rows.num_tokens * config.head_dim + 9 * num_text,
        "activations, LM head": final_norm + head_input + logits + decisions,
        "activations, patch coder out": rows.num_target_images * decode,
    }


def _active_rows(config: LMFusionConfig, rows: SequenceCounts) -> tuple[tuple[float, int, int], tuple[float, int, int]]:
    """How many rows of each tower have a backward, the tower's width, and that of its feed-forward network."""
    text = config.text_config
    return (
        (rows.num_live, text.hidden_size, text.intermediate_size),
        (rows.num_image, config.image_hidden_size, config.image_intermediate_size),
    )


def _head_rows(rows: SequenceCounts, device: str) -> float:
    """Rows that get logits: choosing the labelled ones would make a GPU's host wait."""
    if not rows.num_labels:
        return 0
    return rows.num_labels if device == "cpu" else rows.num_live


def active_row_bytes(
    config: LMFusionConfig, width: int, intermediate_size: int, dtype: torch.dtype, recompute: str
) -> int:
    """What one layer keeps of a row that has a backward; see lmfusion_kernels/block/routed_block.py."""
    if recompute == "layer":
        return width * dtype.itemsize
    text = config.text_config
    q_width, kv_width = (heads * config.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
    gate_up = 2 * intermediate_size if recompute == "none" else 0
    qkv = q_width + 2 * kv_width if text.model_type == "qwen3" else 0  # with QK norm
    values = 2 * width + 2 * q_width + 2 * kv_width + gate_up + qkv
    return values * dtype.itemsize + 4 * text.num_attention_heads + 8


def cast_bytes(sizes: list[Size], dtype: torch.dtype) -> int:
    """Trained float32 weights as the rows' dtype has them; the patch coder and the embeddings are used as they are."""
    if dtype == torch.float32:
        return 0
    has_head = any(size.name.startswith("text.lm_head.") for size in sizes)  # else the embedding is the head, too
    is_used_as_is = ("image.patch_coder.", "image.marker_embedding", *["text.embed_tokens."] * has_head)
    return dtype.itemsize * sum(
        size.num_parameters for size in sizes if size.is_trained and not size.name.startswith(is_used_as_is)
    )


def _optimizer_bytes(size: Size, setup: Setup) -> int:
    num_parameters = size.part(setup.num_ranks)
    block = state_block(torch.Size(size.shape)) if setup.optimizer == "adamw_8bit" else 0
    if not block:
        return 8 * num_parameters
    return 2 * (num_parameters + 4 * num_parameters // block + 4 * 256)  # codes, scales, and what codes stand for


def _layer_sizes(sizes: list[Size]) -> list[Size]:
    """The parameters of the first layer of both towers."""
    return [size for size in sizes if size.name.startswith(("text.layers.0.", "image.layers.0."))]


def _gathered_bytes(sizes: list[Size], dtype: torch.dtype) -> int:
    """Beyond a rank's own parts: two layers, what belongs to none, and gradients on the way to other ranks.

    Those of a layer are there in `dtype` while they are reduced in float32, and another layer's are computed.
    """
    layer = _layer_sizes(sizes)
    root = [size for size in sizes if ".layers." not in size.name]
    in_layer = sum(size.num_parameters for size in layer)
    trained, trained_root = (sum(size.num_parameters for size in group if size.is_trained) for group in (layer, root))
    frozen_root = sum(size.num_parameters for size in root) - trained_root
    weights = dtype.itemsize * (2 * in_layer + frozen_root) + 4 * trained_root
    return weights + (dtype.itemsize + 4) * trained + 4 * trained_root


def _working_bytes(config: LMFusionConfig, rows: SequenceCounts, sizes: list[Size], setup: Setup) -> float:
    """What the largest of three moments needs beyond all activations: the loss, a layer, the embedding's gradient."""
    text, e = config.text_config, setup.dtype.itemsize
    first, layers, head, second = activation_bytes(config, rows, setup).values()
    num_logits = _head_rows(rows, setup.device) * (text.vocab_size + 2)
    loss = head + second + 8 * num_logits  # the gradients of logits and of their logarithms, float32
    q_width, kv_width = (heads * config.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
    layer = e * sum(size.num_parameters for size in _layer_sizes(sizes) if size.is_trained)
    for num_rows, width, intermediate_size in _active_rows(config, rows):
        gradients = (4 * intermediate_size + 5 * width + 3 * q_width + 4 * kv_width) * e
        kept, needed = (
            active_row_bytes(config, width, intermediate_size, setup.dtype, mode) for mode in (setup.recompute, "none")
        )
        layer += num_rows * (gradients + needed - kept)
    end = 0.0
    if not setup.frozen_text:
        vocabulary = 4 * text.vocab_size * text.hidden_size
        head_gradient = vocabulary + (vocabulary // 2 if e == 2 else 0)  # as the product gives it, then in float32
        loss = max(loss, head + second + (e - 4) * num_logits + head_gradient)
        layer += vocabulary  # the head's gradient waits for the embedding's where they are one
        end = (3 if text.tie_word_embeddings and setup.dtype == torch.float32 else 2) * vocabulary
    return max(first + layers + max(loss, layer), first + end) - (first + layers + head + second)


@lru_cache
def patch_coder_bytes(coder: CoderFields, width: int, latent_shape: tuple[int, int, int]) -> tuple[int, int]:
    """What autograd keeps of both halves of the patch coder for an image of `latent_shape` (C, h, w), weights aside."""
    with torch.device("meta"):
        module = build_patch_coder(PatchCoderConfig(*coder), latent_shape[0], width)
        latents, timesteps = torch.empty(1, *latent_shape), torch.empty(1, dtype=torch.int64)

        def both_halves() -> Tensor:
            rows, skip = module.encode(latents, timesteps)
            return module.decode(rows.detach().clone().requires_grad_(), timesteps, skip)

        first = saved_bytes(lambda: module.encode(latents, timesteps), module.parameters())
        return first, saved_bytes(both_halves, module.parameters()) - first


def saved_bytes(call: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps of `call()`, but for those of `known` tensors."""
    storages = {}
    of_known = {tensor.untyped_storage()._cdata for tensor in known}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in of_known:
            storages[storage._cdata] = storage  # held, so that no other takes its place in memory
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(storage.nbytes() for storage in storages.values())
