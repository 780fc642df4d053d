"""How is a LLaVA-type model's folder read? Its LLM as any other, and beside it what it sees with.

Checkpoints name the same tensors in several ways, by the version of transformers that wrote them:

    language_model.model.layers.0...    model.language_model.layers.0...    text.layers.0...
    language_model.lm_head.weight       lm_head.weight                      text.lm_head.weight
    vision_tower.vision_model.x         model.vision_tower.x                vision.model.vision_tower.x
    multi_modal_projector.x             model.multi_modal_projector.x       vision.model.multi_modal_projector.x
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, PreTrainedConfig

from lmfusion.conversion.huggingface import read_safetensors, read_tokenizer
from lmfusion.vision import VLM_TYPES, check_vlm

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
VISION_PREFIX = "vision.model."
_VISION_PARTS = ("vision_tower.", "multi_modal_projector.", "image_newline")
_COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Ends of names of tensors that older checkpoints hold and that are computed."""


def is_vlm(folder: Path) -> bool:
    """Whether `folder` holds a vision-language model of a type that is supported."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") in VLM_TYPES
    except (OSError, ValueError, AttributeError):
        return False


def open_folder(
    folder: Path,
) -> tuple[PreTrainedConfig, Callable[[torch.dtype | None], dict[str, Tensor]], Callable[[], Any]]:
    """The configuration of the VLM in `folder`, and readers of its tensors (file names) and of its tokenizer."""
    config = read_config(folder)
    is_tied = config.text_config.tie_word_embeddings

    def read_tensors(dtype: torch.dtype | None) -> dict[str, Tensor]:
        named = {file_name(name): tensor for name, tensor in read_safetensors(folder, dtype).items()}
        return {
            name: tensor
            for name, tensor in named.items()
            if not name.endswith(_COMPUTED) and not (is_tied and name == "text.lm_head.weight")
        }

    return config, read_tensors, lambda: _read_tokenizer(folder)


def read_config(folder: Path) -> PreTrainedConfig:
    """transformers' configuration object of the VLM in `folder`."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever transformers' validation raises on values of the wrong type
        raise ValueError(f"{folder / 'config.json'} is no configuration that transformers can read: {error}") from error
    # transformers ties the head of such a model where the whole says so, whatever its LLM by itself does
    config.text_config.tie_word_embeddings = config.tie_word_embeddings
    check_vlm(config, str(folder))
    return config


def read_image_processor(folder: Path) -> Any:
    """The image processor saved in `folder`, that of Pillow; None where there is none."""
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return None
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    except Exception as error:  # transformers raises many kinds, and does not name the file
        raise ValueError(f"the image processor in {folder} is damaged: {error}") from error


def _read_tokenizer(folder: Path) -> Any:
    """The tokenizer, with the chat template that some checkpoints keep in their processor's files alone."""
    tokenizer = read_tokenizer(folder)
    if tokenizer is not None and not tokenizer.chat_template:
        for name in ("chat_template.json", "processor_config.json"):
            if (folder / name).is_file():
                try:
                    template = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
                except (ValueError, AttributeError) as error:
                    raise ValueError(f"{folder / name} is no valid JSON object: {error}") from error
                tokenizer.chat_template = tokenizer.chat_template or template
    return tokenizer


def file_name(name: str) -> str:
    """File name of the tensor that a checkpoint of a VLM calls `name`."""
    plain = name.removeprefix("model.")
    if plain.startswith(_VISION_PARTS):
        return VISION_PREFIX + plain.replace("vision_tower.vision_model.", "vision_tower.", 1)
    llm = plain.removeprefix("language_model.")
    return "text." + llm.removeprefix("model.")


def to_transformers(name: str) -> str:
    """What the state dict of transformers' class calls the tensor of this file name."""
    if name.startswith(VISION_PREFIX):
        return "model." + name.removeprefix(VISION_PREFIX)
    plain = name.removeprefix("text.")
    return plain if plain.startswith("lm_head.") else "model.language_model." + plain
