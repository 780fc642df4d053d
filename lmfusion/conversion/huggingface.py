"""How is a Hugging Face folder read? config.json, safetensors (single or sharded) and tokenizer files; no pickle."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from lmfusion.conversion.architectures import MODEL_TYPES, unsupported
from lmfusion.conversion.names import from_llama

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def open_folder(
    folder: Path,
) -> tuple[PreTrainedConfig, Callable[[torch.dtype | None], dict[str, Tensor]], Callable[[], Any]]:
    """The configuration of the LLM in `folder`, and readers of its tensors (file names) and of its tokenizer."""
    config = read_config(folder)

    def read_tensors(dtype: torch.dtype | None) -> dict[str, Tensor]:
        tensors = {}
        for name, tensor in read_safetensors(folder, dtype).items():
            is_tied_head = name == "lm_head.weight" and config.tie_word_embeddings
            if not is_tied_head and not name.endswith("rotary_emb.inv_freq"):
                tensors[from_llama(name)] = tensor
        return tensors

    return config, read_tensors, lambda: read_tokenizer(folder)


def read_config(folder: Path) -> PreTrainedConfig:
    """transformers' configuration object of the LLM in `folder`."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; a base model is a folder that transformers can load")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        model_type = settings.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no valid JSON object: {error}") from error
    if model_type not in MODEL_TYPES:  # before transformers looks at it: it may not know the architecture either
        raise ValueError(
            unsupported(
                str(folder),
                f"architecture {model_type!r}",
                f"Llama-type LLMs: {', '.join(MODEL_TYPES)}; VLMs around one: llava, llava_next",
            )
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever transformers' validation raises on values of the wrong type
        raise ValueError(f"{path} is no configuration that transformers can read: {error}") from error


def read_safetensors(folder: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, or of the shards that model.safetensors.index.json lists.

    Floating-point tensors are converted to `dtype` unless it is None. Raises FileNotFoundError when a file is missing
    and ValueError when one is damaged.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = [folder / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is damaged: {error!r}; copy it again from its source") from error
    elif any(folder.glob("*.bin")):
        raise ValueError(
            f"{folder} holds its weights as pickle (.bin), which can run code when read; convert them to safetensors, "
            "for example with transformers' save_pretrained"
        )
    else:
        raise FileNotFoundError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json")
    tensors: dict[str, Tensor] = {}
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, though {index.name} lists it; copy it from the model's source")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    tensor = file.get_tensor(name)
                    tensors[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or damaged ({error}); copy it again from its source") from error
    return tensors


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer saved in `folder`; None where there is none."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds, and do not name the file
        raise ValueError(f"the tokenizer in {folder} is damaged: {error}") from error
