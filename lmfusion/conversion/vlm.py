"""Reads folders of LLaVA-type models: the LLM as any other, and the vision encoder and projector beside it.

The names of tensors in a checkpoint depend on the version of transformers that wrote it (last column: our names):

    language_model.model.layers.0...    model.language_model.layers.0...    text.layers.0...
    language_model.lm_head.weight       lm_head.weight                      text.lm_head.weight
    vision_tower.vision_model.x         model.vision_tower.x                vision.model.vision_tower.x
    multi_modal_projector.x             model.multi_modal_projector.x       vision.model.multi_modal_projector.x
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedConfig

from lmfusion.conversion.architectures import VLM_TYPES, check_vlm
from lmfusion.conversion.huggingface import (
    CONFIG_NAME,
    build_config,
    end_tokens,
    keep_own_head,
    read_settings,
    read_tensors,
)
from lmfusion.conversion.model_limits import check_token_ids
from lmfusion.conversion.tokenizer import PROCESSOR_FILES, read_tokenizer, refuse_code

VISION_PREFIX = "vision.model."
_VISION_PARTS = ("vision_tower.", "multi_modal_projector.", "image_newline")


def is_vlm(folder: Path) -> bool:
    """Whether `folder` holds a vision-language model of a supported type."""
    try:
        return read_settings(folder / CONFIG_NAME).get("model_type") in VLM_TYPES
    except (OSError, ValueError):
        return False


def open_folder(
    folder: Path,
) -> tuple[PreTrainedConfig, Callable[[torch.dtype | None], dict[str, Tensor]], Callable[[], Any]]:
    """The configuration of the VLM in `folder`, and readers of its tensors (file names) and of its tokenizer."""
    config = read_config(folder)
    text = config.text_config
    return config, lambda dtype: read_tensors(folder, text, file_name, dtype), lambda: _read_tokenizer(folder)


def read_config(folder: Path) -> PreTrainedConfig:
    """transformers' configuration object of the VLM in `folder`."""
    path = folder / CONFIG_NAME
    config = build_config(read_settings(path), path)
    check_vlm(config, str(folder))
    text = config.text_config
    # transformers ties the head where the configuration of the whole model says so, and ignores that of the LLM
    text.tie_word_embeddings = config.tie_word_embeddings
    keep_own_head(text, folder, file_name)
    config.tie_word_embeddings = text.tie_word_embeddings
    text.eos_token_id = end_tokens(text.eos_token_id, folder)
    check_token_ids({"image_token_index": config.image_token_id}, text.vocab_size, str(path))
    return config


def read_image_processor(folder: Path) -> Any:
    """The image processor saved in `folder`, in its version for Pillow; None where there is none."""
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return None
    refuse_code(folder)
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds, and does not name the file
        raise ValueError(f"the image processor in {folder} is damaged: {error}") from error


def _read_tokenizer(folder: Path) -> Any:
    """The tokenizer, with the chat template that some checkpoints keep only in their processor's files."""
    tokenizer = read_tokenizer(folder)
    if tokenizer is not None and not tokenizer.chat_template:
        for name in ("chat_template.json", "processor_config.json"):
            if (folder / name).is_file():
                template = read_settings(folder / name).get("chat_template")
                tokenizer.chat_template = tokenizer.chat_template or template
    return tokenizer


def file_name(name: str) -> str:
    """File name of the tensor that a checkpoint of a VLM calls `name`."""
    plain = name.removeprefix("model.")
    if plain.startswith(_VISION_PARTS):
        return VISION_PREFIX + plain.replace("vision_tower.vision_model.", "vision_tower.", 1)
    llm = plain.removeprefix("language_model.")
    return "text." + llm.removeprefix("model.")
