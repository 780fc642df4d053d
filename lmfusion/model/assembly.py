"""Builds the modules of a model from plain data, and takes plain data from the modules.

A model is built on the meta device first, so that wrong sizes are found before any memory is taken for them.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from transformers.initialization import no_init_weights

from lmfusion.conversion import EMBEDDING_NAME, names
from lmfusion.conversion.tokenizer import check_tokenizer
from lmfusion.model.codec import Codec, load_codec
from lmfusion.model.configuration import LMFusionConfig
from lmfusion.model.model_card import ModelSummary
from lmfusion.model.patch_coder import build_patch_coder
from lmfusion.model.pretrained import PreTrainedMethods
from lmfusion.model.saved_files import name_model_errors
from lmfusion.model.saving import ModelData, from_prefixes
from lmfusion.model.vision import VisionEncoder
from lmfusion_kernels.ops.lora import is_adapted

FROZEN_PREFIXES = ("text.", "vision.")
"""Of the tensors that come from the base: its LLM, and a VLM's vision encoder and projector."""
M = TypeVar("M", bound=PreTrainedMethods)


def assemble(
    build: Callable[[LMFusionConfig, Codec], M], data: ModelData, source: str, new_image_seed: int | None = None
) -> M:
    """A model that holds the tensors of `data`, which is emptied of them.

    build: makes the model of a configuration and a codec. source: what errors call the files. new_image_seed: give the
    model a new image tower with weights from this seed; None: the image tower is in `data`.

    Raises ValueError where tensors, tokenizer or image processor do not fit the configuration.
    """
    config, vocab_size = data.config, data.config.text_config.vocab_size
    # Tensors under unknown names count with the rest, so that `check_tensors` reports them
    is_base_alone = new_image_seed is not None
    frozen = {name: t for name, t in data.tensors.items() if is_base_alone or name.startswith(FROZEN_PREFIXES)}
    image = {name: t for name, t in data.tensors.items() if name not in frozen}
    data.tensors.clear()  # so that `names.stack` below frees each tensor as soon as it has been stacked
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(new_image_seed or 0)
        if config.vlm_config is not None:  # before memory is taken for what the configuration asks for
            with name_model_errors(source):
                vision = VisionEncoder(config.vlm_config, "meta").state_dict(prefix="vision.")
            names.check_tensors(from_prefixes(frozen, "vision."), vision, source)
        codec = load_codec(config.codec)
        with name_model_errors(source), torch.device("meta"), no_init_weights():
            model = build(config, codec)
            expected = names.split(model.state_dict(), config.text_config)
        names.check_tensors(frozen, from_prefixes(expected, *FROZEN_PREFIXES), source)
        dtype = frozen[EMBEDDING_NAME].dtype
        model.load_state_dict(names.stack(frozen), strict=False, assign=True)
        if new_image_seed is None:
            names.check_tensors(image, from_prefixes(expected, "image."), source)
            model.load_state_dict(names.stack(image), strict=False, assign=True)
        else:
            _initialize_image_tower(model, dtype)
    assert not any(parameter.is_meta for parameter in model.parameters())
    if data.tokenizer is not None:
        check_tokenizer(data.tokenizer, vocab_size, source)
    model.tokenizer, model.base, model.trained = data.tokenizer, data.base, data.trained
    with name_model_errors(source):
        if model.vision is not None:
            model.vision.image_processor = data.image_processor
            model.vision.check_image_processor()
        _check_image_fits(model)
    model.freeze_text()
    return model.eval()


def _initialize_image_tower(model: PreTrainedMethods, dtype: torch.dtype) -> None:
    """Weights for an image tower that is on the meta device, from the text tower and torch's global generator."""
    tower = model.image.to(dtype).to_empty(device="cpu")
    width = tower.norm.weight.numel()
    tower.patch_coder = build_patch_coder(model.config.image.patch_coder, model.codec.latent_channels, width)
    tower.patch_coder.to(dtype)
    tower.initialize(model.text)


def _check_image_fits(model: PreTrainedMethods) -> None:
    context = getattr(model.config.text_config, "max_position_embeddings", None)
    if context is not None and model.tokens_per_image + 2 > context:
        raise ValueError(
            f"an image of {model.codec.config.image_size} pixels takes {model.tokens_per_image} tokens with codec "
            f"{model.codec.config.kind!r} and patch_size {model.config.image.patch_coder.patch_size}, but the LLM's "
            f"context is {context}; use an autoencoder as codec, smaller images, or a larger patch_size"
        )


def file_tensors(model: PreTrainedMethods, *prefixes: str) -> dict[str, Tensor]:
    """The tensors of `model` whose names begin with one of `prefixes`, by file name, on the CPU."""
    tensors = {name: tensor.cpu() for name, tensor in from_prefixes(model.state_dict(), *prefixes).items()}
    return names.split(tensors, model.config.text_config)


def text_tensors(model: PreTrainedMethods) -> dict[str, Tensor]:
    """The text tower's tensors by file name."""
    return file_tensors(model, "text.")


def base_tensors(model: PreTrainedMethods) -> dict[str, Tensor]:
    """Everything that came from the base, by file name: the text tower's tensors, and a VLM's vision encoder's."""
    return text_tensors(model) | file_tensors(model, "vision.")


def to_data(model: PreTrainedMethods, *prefixes: str) -> ModelData:
    """`model` as plain data, with the tensors under `prefixes`. Raises ValueError where peft's adapters are on it."""
    adapted = [name for name, module in model.named_modules() if is_adapted(module) or "modules_to_save" in name]
    if adapted:
        raise ValueError(
            f"peft's adapters are on the model, first at {adapted[0]}; save them with the peft model's own "
            "save_pretrained, or make them part of the weights with its merge_and_unload() and save what that gives"
        )
    image_processor = None if model.vision is None else model.vision.image_processor
    tensors: dict[str, Tensor] = {}
    for prefix in prefixes:
        tensors |= file_tensors(model, prefix)
    return ModelData(model.config, tensors, model.tokenizer, image_processor, model.base, model.trained)


def summarize(model: PreTrainedMethods) -> ModelSummary:
    """The figures of `model` for its card."""
    parts = {"text": model.text, "image": model.image, "codec": model.codec, "vision": model.vision}
    counts = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in parts.items()
        if part is not None
    }
    return ModelSummary(counts, model.tokens_per_image)
