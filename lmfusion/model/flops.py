"""Floating-point operations of training on a packed sequence, and the rate that the machine reaches.

Only matrix products are counted, with two operations per multiply-add, as torch.utils.flop_counter does:

| tokens in a tower's layers | forward | backward |
| --- | --- | --- |
| constant (frozen text before the first image) | products | none |
| live (other text), frozen text tower | products | input gradients: the same number |
| image; live text of a trained text tower | products | input and weight gradients: twice the number |

Attention counts visible (query, key) pairs: two products in the forward, and four in the backward for the tokens that
are not constant. The LM head counts tokens with a label, and only the forward of constant ones. The patch coder counts
its convolutions and linear maps: encoding every image, decoding only target images. Norms, activations, embeddings, the
optimizer and the codec are left out.

MFU is the model's FLOPs divided by what the device could do in the same time. Operations that are done a second time
(by `train.recompute`, and the scores in the backward of attention) take time without progress, so they are counted
separately, as recomputed.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lmfusion.model.batch import Batch
from lmfusion.model.configuration import LMFusionConfig
from lmfusion.model.patch_coder import PatchCoderConfig, build_patch_coder

CoderFields = tuple[str, int, tuple[int, ...], int]

CPU_MATMUL_SIZE, GPU_MATMUL_SIZE = 1024, 8192


@dataclass(frozen=True)
class SequenceCounts:
    """What the FLOPs and memory of a packed sequence depend on. Also expected values, so not always whole numbers."""

    num_constant: float
    """Tokens of this class, like num_live and num_image; see `lmfusion_kernels.TokenLayout`."""
    num_live: float
    num_image: float
    num_images: float
    num_target_images: float
    """Images with a diffusion loss; the others are input images."""
    num_labels: float
    num_boi_targets: float
    pairs: float
    """Visible (query, key) pairs."""
    active_pairs: float
    """Visible pairs whose query is not constant."""
    active_key_pairs: float
    """Visible pairs in which neither query nor key is constant."""
    latent_shape: tuple[int, int, int]
    """(C, h, w) of one image."""

    @classmethod
    def of(cls, batch: Batch) -> "SequenceCounts":
        """The counts of a batch on the CPU; on a GPU this would wait for the device."""
        layout = batch.layout
        channels, height, width = batch.latents.shape[1:]
        active = layout.active
        assert active.query_start is not None and active.query_end is not None
        return cls(
            layout.num_constant,
            layout.num_live,
            layout.num_image,
            batch.num_images,
            batch.num_target_images,
            batch.num_labels,
            batch.num_boi_targets,
            _area(layout.key_start, layout.key_end),
            _area(active.key_start, active.key_end),
            _area(active.query_start, active.query_end),
            (channels, height, width),
        )

    @property
    def num_active(self) -> float:
        return self.num_live + self.num_image

    @property
    def num_tokens(self) -> float:
        return self.num_constant + self.num_active


def _area(start: Tensor, end: Tensor) -> int:
    return int((end.long() - start.long()).sum())


@dataclass(frozen=True)
class Flops:
    """Operations of one part of the model."""

    forward: float = 0
    backward: float = 0
    recomputed: float = 0
    """Forward operations that the backward repeats."""

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)

    @property
    def model(self) -> float:
        """What MFU counts."""
        return self.forward + self.backward

    @property
    def total(self) -> float:
        """What the device computes."""
        return self.model + self.recomputed


def batch_flops(config: LMFusionConfig, batch: Batch, *, frozen_text: bool) -> int:
    """FLOPs of training on `batch` (on the CPU), forward and backward, without recomputed operations."""
    parts = flops_by_part(config, SequenceCounts.of(batch), frozen_text=frozen_text)
    return int(sum(part.model for part in parts.values()))


def flops_by_part(
    config: LMFusionConfig, counts: SequenceCounts, *, frozen_text: bool, recompute: str = "none"
) -> dict[str, Flops]:
    """FLOPs of a packed sequence, forward and backward, by class of its tokens and by part of the model."""
    text = config.text_config
    num_layers, pair_width = text.num_hidden_layers, text.num_attention_heads * config.head_dim
    text_layer, image_layer = layer_products(config)
    every_product, ffn = set(text_layer), {"gate_up_proj", "down_proj"}
    image_trained = {"deep": every_product, "shallow": ffn, "none": set()}[config.image.separation]
    recomputed = {"none": set(), "ffn": {"gate_up_proj"}, "layer": every_product - {"down_proj"}}[recompute]

    def layers(num_tokens: float, layer: dict[str, int], trained: set[str]) -> Flops:
        def products(names: set[str]) -> float:
            return 2 * num_tokens * num_layers * sum(layer[name] for name in names)

        return Flops(products(every_product), products(every_product) + products(trained), products(recomputed))

    product = 2 * num_layers * pair_width
    # The backward of attention computes the scores again
    scores = product * counts.active_pairs
    attention = Flops(
        2 * product * counts.pairs,
        2 * product * (counts.active_pairs + counts.active_key_pairs),
        scores + (2 * product * counts.active_pairs if recompute == "layer" else 0),
    )
    head = 2 * counts.num_labels * text.hidden_size
    vocabulary = head * text.vocab_size
    boi_targets = 2 * counts.num_boi_targets * text.hidden_size
    fields = coder_fields(config.image.patch_coder)
    encode, decode = patch_coder_flops(fields, config.image_hidden_size, counts.latent_shape)
    return {
        "constant text": Flops(layers(counts.num_constant, text_layer, set()).forward),
        "live text": layers(counts.num_live, text_layer, set() if frozen_text else every_product),
        "image tokens": layers(counts.num_image, image_layer, image_trained if frozen_text else every_product),
        "attention": attention,
        # The head's rows of BOI and EOI are always trained
        "LM head": Flops(vocabulary + 2 * head, vocabulary * (1 if frozen_text else 2) + 2 * (2 * head)),
        "BOI loss": Flops(boi_targets * (text.vocab_size + 2), 2 * boi_targets),
        "patch coder": Flops(
            counts.num_images * encode.forward + counts.num_target_images * decode.forward,
            counts.num_images * encode.backward + counts.num_target_images * decode.backward,
        ),
    }


def layer_products(config: LMFusionConfig) -> tuple[dict[str, int], dict[str, int]]:
    """Elements of each matrix of one layer: of the text tower, and of the image tower."""
    text, head_dim = config.text_config, config.head_dim
    num_heads, num_kv_heads = text.num_attention_heads, text.num_key_value_heads
    towers = (
        (text.hidden_size, text.intermediate_size),
        (config.image_hidden_size, config.image_intermediate_size),
    )
    sizes = [
        {
            "qkv_proj": (num_heads + 2 * num_kv_heads) * head_dim * width,
            "o_proj": num_heads * head_dim * width,
            "gate_up_proj": 2 * intermediate_size * width,
            "down_proj": intermediate_size * width,
        }
        for width, intermediate_size in towers
    ]
    return sizes[0], sizes[1]


def coder_fields(config: PatchCoderConfig) -> CoderFields:
    """The fields of `config` as a tuple: a cache key, since `config` itself cannot be hashed."""
    return config.kind, config.patch_size, config.channels, config.num_blocks


@lru_cache
def patch_coder_flops(coder: CoderFields, width: int, latent_shape: tuple[int, int, int]) -> tuple[Flops, Flops]:
    """FLOPs of encoding and of decoding one image of `latent_shape` (C, h, w) for an image tower of `width`."""
    with torch.device("meta"):
        module = build_patch_coder(PatchCoderConfig(*coder), latent_shape[0], width)
        latents, timesteps = torch.empty(1, *latent_shape), torch.empty(1, dtype=torch.int64)
        encoded = []
        encode = products_of(module, lambda: encoded.append(module.encode(latents, timesteps)))
        [(tokens, skip)] = encoded
        decode = products_of(module, lambda: module.decode(tokens, timesteps, skip))
    return _of_products(encode), _of_products(decode)


def _of_products(products: list[tuple[int, bool]]) -> Flops:
    forward = sum(flops for flops, _ in products)
    return Flops(forward, forward + sum(flops for flops, needs_grad in products if needs_grad))


def products_of(module: nn.Module, call: Callable[[], object]) -> list[tuple[int, bool]]:
    """FLOPs of each convolution and linear map of `module` that `call` runs, and whether its input needs a gradient."""
    products = []

    def record(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        products.append((2 * output.numel() * layer.weight[0].numel(), inputs[0].requires_grad))

    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    call()
    for hook in hooks:
        hook.remove()
    return products


@lru_cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that torch.mm reaches here on large square matrices of normal random numbers; MFU is measured against it.

    It is the median of a few products, measured once per process in a fraction of a second.
    """
    size = GPU_MATMUL_SIZE if device.type == "cuda" else CPU_MATMUL_SIZE
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = []
    for _ in range(2 + 7):  # the first two warm up
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:])


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
