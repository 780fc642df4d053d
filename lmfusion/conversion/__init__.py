"""Where does the text tower come from? `load_base` reads any supported LLM into one form.

Supported: Llama (and what shares its architecture, such as SmolLM2), Mistral, Qwen2, Qwen3; from a Hugging Face folder
with safetensors, a GGUF file, or a name known to the Hugging Face hub.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import PreTrainedConfig

from lmfusion.conversion import gguf, huggingface
from lmfusion.conversion.architectures import check_supported

EMBEDDING_NAME = "text.embed_tokens.weight"


@dataclass
class BaseModel:
    """A pretrained LLM, read and checked."""

    name: str
    """Absolute path, or the name on the hub."""
    config: PreTrainedConfig
    tensors: dict[str, Tensor]
    """By file name (`text.layers.0.self_attn.q_proj.weight`); see `lmfusion.conversion.names`."""
    read_tokenizer: Callable[[], Any]
    """Reads the transformers tokenizer, which may take seconds; None where the checkpoint has none."""


def load_base(path: str | Path, dtype: torch.dtype | None = None) -> BaseModel:
    """Read the LLM at `path`: a Hugging Face folder, a GGUF file, or a name on the hub.

    dtype: of the tensors; None keeps the checkpoint's (that of its embedding), or float32 for GGUF.

    Raises FileNotFoundError when there is nothing at `path`, and ValueError for a damaged file or an unsupported
    architecture.
    """
    name, config, read_tensors, read_tokenizer = open_base(path)
    tensors = read_tensors(dtype)
    if dtype is None and EMBEDDING_NAME in tensors:  # some checkpoints keep their norms in another dtype
        dtype = tensors[EMBEDDING_NAME].dtype
        tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    return BaseModel(name, config, tensors, read_tokenizer)


def open_base(
    path: str | Path,
) -> tuple[str, PreTrainedConfig, Callable[[torch.dtype | None], dict[str, Tensor]], Callable[[], Any]]:
    """Name and configuration of the LLM at `path`, and readers of its tensors and of its tokenizer.

    Path, name and errors are those of `load_base`.
    """
    location = Path(path).expanduser()
    name = str(location.resolve()) if location.exists() else str(path)
    if not location.exists():
        location = _from_hub(str(path))
    if location.is_dir():
        config, read_tensors, read_tokenizer = huggingface.open_folder(location)
    elif location.suffix == ".gguf":
        config, read_tensors, read_tokenizer = gguf.open_file(location)
    else:
        raise ValueError(f"{location} is neither a Hugging Face folder nor a .gguf file")
    check_supported(config, str(location))
    return name, config, read_tensors, read_tokenizer


def _from_hub(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]))
    except Exception as error:  # many kinds: malformed name, no network, no such repository, no access
        raise FileNotFoundError(
            f"no base model at {name!r}: there is no such folder or file here, and the Hugging Face hub gave none "
            f"({type(error).__name__}); give the path of a folder with config.json and safetensors, or of a .gguf file"
        ) from error
