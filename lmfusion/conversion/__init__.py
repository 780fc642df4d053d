"""Reads base models: `load_base` reads any supported LLM or VLM into one form.

Supported: Llama (and models of its architecture, such as SmolLM2), Mistral, Qwen2, Qwen3; from a Hugging Face folder
with safetensors, a GGUF file, or a name on the Hugging Face hub. Vision-language models around such an LLM, LLaVA and
LLaVA-NeXT, from a folder or a name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lmfusion.conversion import gguf, huggingface, vlm
from lmfusion.conversion.architectures import check_supported
from lmfusion.conversion.hub import download
from lmfusion.conversion.tokenizer import with_tokenizer_check

EMBEDDING_NAME = "text.embed_tokens.weight"


@dataclass(frozen=True)
class OpenedBase:
    """A pretrained LLM or VLM whose tensors have not been read yet."""

    name: str
    """Absolute path, or the name on the hub."""
    config: PreTrainedConfig
    """The LLM's."""
    vlm_config: PreTrainedConfig | None
    """The configuration of the vision-language model that the LLM is a part of; None: it is an LLM alone."""
    read_tensors: Callable[[torch.dtype | None], dict[str, Tensor]]
    """By file name (`text.layers.0.self_attn.q_proj.weight`); see `lmfusion.conversion.names`."""
    read_tokenizer: Callable[[], Any]
    """Reads the transformers tokenizer, which may take seconds; None where the checkpoint has none."""
    read_image_processor: Callable[[], Any] = lambda: None
    """Reads the image processor of a VLM in the same way."""
    location: Path | None = None
    """The folder or file it is read from."""


@dataclass
class BaseModel:
    """A pretrained LLM or VLM, read and checked."""

    name: str
    """Absolute path, or the name on the hub."""
    config: PreTrainedConfig
    """The LLM's."""
    tensors: dict[str, Tensor]
    """By file name (`text.layers.0.self_attn.q_proj.weight`); see `lmfusion.conversion.names`."""
    read_tokenizer: Callable[[], Any]
    """Reads the transformers tokenizer, which may take seconds; None where the checkpoint has none."""
    vlm_config: PreTrainedConfig | None = None
    """The configuration of the vision-language model that the LLM is a part of; None: it is an LLM alone."""
    read_image_processor: Callable[[], Any] = lambda: None
    """Reads the image processor of a VLM in the same way."""
    location: Path | None = None
    """The folder or file it is read from."""


def load_base(path: str | Path, dtype: torch.dtype | None = None, is_vlm: bool | None = None) -> BaseModel:
    """Read the LLM or VLM at `path`: a Hugging Face folder, a GGUF file, or a name on the hub.

    dtype: of the tensors; None keeps that of the checkpoint's embedding, or float32 for GGUF. is_vlm: whether it must
    be a VLM or an LLM; None: either.

    Raises FileNotFoundError when there is nothing at `path`, and ValueError for a damaged file, an unsupported
    architecture, or a model of the other kind.
    """
    opened = open_base(path)
    if is_vlm is not None and is_vlm != (opened.vlm_config is not None):
        if is_vlm:
            raise ValueError(
                f"{path} must be a vision-language model, got an LLM of type {opened.config.model_type!r}; use "
                "LMFusion.from_llm"
            )
        assert opened.vlm_config is not None
        raise ValueError(
            f"{path} must be an LLM, got a vision-language model of type {opened.vlm_config.model_type!r}; use "
            "LMFusion.from_vlm"
        )
    tensors = opened.read_tensors(dtype)
    if dtype is None and EMBEDDING_NAME in tensors:  # in some checkpoints the norms have another dtype
        dtype = tensors[EMBEDDING_NAME].dtype
        tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    return BaseModel(
        opened.name,
        opened.config,
        tensors,
        opened.read_tokenizer,
        opened.vlm_config,
        opened.read_image_processor,
        opened.location,
    )


def open_base(path: str | Path) -> OpenedBase:
    """The LLM or VLM at `path`: its configuration, and readers of its tensors, tokenizer and image processor.

    `path` and errors are those of `load_base`.
    """
    location = Path(path).expanduser()
    name = str(_without_links(location)) if location.exists() else str(path)
    if not location.exists():
        location = download(str(path))
    vlm_config = None
    if location.is_dir() and vlm.is_vlm(location):
        vlm_config, read_tensors, read_tokenizer = vlm.open_folder(location)
        config = vlm_config.text_config
    elif location.is_dir():
        config, read_tensors, read_tokenizer = huggingface.open_folder(location)
    elif location.suffix == ".gguf":
        config, read_tensors, read_tokenizer = gguf.open_file(location)
    else:
        raise ValueError(f"a base model must be a Hugging Face folder or a .gguf file, got {location}")
    check_supported(config, str(location))
    return OpenedBase(
        name,
        config,
        vlm_config,
        read_tensors,
        with_tokenizer_check(read_tokenizer, config.vocab_size, str(location)),
        lambda: None if vlm_config is None else vlm.read_image_processor(location),
        location,
    )


def _without_links(path: Path) -> Path:
    """The absolute path. A file keeps its own name, since the target of a link may be named without .gguf."""
    return path.parent.resolve() / path.name if path.is_file() else path.resolve()
