"""Reads Hugging Face folders: configurations and safetensors (single or sharded), without pickle and without code."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from lmfusion.conversion.architectures import MODEL_TYPES, unsupported
from lmfusion.conversion.model_limits import check_sizes
from lmfusion.conversion.names import from_llama
from lmfusion.conversion.tokenizer import read_tokenizer
from lmfusion.utils.json_files import read_json_object

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
EMBEDDING, HEAD = "text.embed_tokens.weight", "text.lm_head.weight"
COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Endings of tensors in older checkpoints that follow from the configuration."""
_CODE_KEYS = ("auto_map", "attn_implementation", "_attn_implementation", "experts_implementation", "custom_pipelines")
"""Keys of a config.json that name code in the folder, or in a repository of kernels that transformers would fetch."""


def open_folder(
    folder: Path,
) -> tuple[PreTrainedConfig, Callable[[torch.dtype | None], dict[str, Tensor]], Callable[[], Any]]:
    """The configuration of the LLM in `folder`, and readers of its tensors (file names) and of its tokenizer."""
    config = read_config(folder)
    return config, lambda dtype: read_tensors(folder, config, from_llama, dtype), lambda: read_tokenizer(folder)


def read_config(folder: Path) -> PreTrainedConfig:
    """transformers' configuration object of the LLM in `folder`, corrected by the files beside it."""
    path = folder / CONFIG_NAME
    settings = read_settings(path)
    if settings.get("model_type") not in MODEL_TYPES:  # before transformers reads it, which may not know it either
        raise ValueError(
            unsupported(
                str(folder),
                f"architecture {settings.get('model_type')!r}",
                f"Llama-type LLMs: {', '.join(MODEL_TYPES)}; VLMs around one: llava, llava_next",
            )
        )
    config = build_config(settings, path)
    config.eos_token_id = end_tokens(config.eos_token_id, folder)
    keep_own_head(config, folder, from_llama)
    return config


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a configuration file. Raises FileNotFoundError, other OSErrors, or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} holds no {path.name}; a base model is a folder that transformers can load"
        )
    return read_json_object(path, strict=False)


def build_config(settings: Mapping[str, Any], path: Path) -> PreTrainedConfig:
    """transformers' configuration object of the `settings` that were read from `path`.

    Keys that name code, in the folder or in a repository of kernels, are left out. Raises ValueError for values that no
    model has.
    """
    check_sizes(settings, str(path))
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[settings["model_type"]].from_dict(without_code(settings))
    except Exception as error:  # whatever transformers' validation raises on values of the wrong type
        raise ValueError(f"{path} is not a configuration that transformers can read: {error}") from error
    return config


def without_code(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The `settings` of a config.json without the keys, at any depth, that would make transformers look for code."""
    plain = {key: value for key, value in settings.items() if key not in _CODE_KEYS}
    return {key: without_code(value) if isinstance(value, dict) else value for key, value in plain.items()}


def end_tokens(configured: int | list[int] | None, folder: Path) -> int | list[int] | None:
    """Tokens that end an answer: `configured` in config.json, and those of generation_config.json in `folder`."""
    path = folder / GENERATION_NAME
    generation = read_settings(path).get("eos_token_id") if path.is_file() else None
    ids: list[int] = []
    for value in (configured, generation):
        ids += [token_id for token_id in (value if isinstance(value, list) else [value]) if token_id not in (None, -1)]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise ValueError(f"{path}: eos_token_id must be a token id or a list of them, got {generation!r:.80}")
    ids = list(dict.fromkeys(ids))
    return ids if len(ids) > 1 else next(iter(ids), None)


def keep_own_head(config: PreTrainedConfig, folder: Path, rename: Callable[[str], str]) -> None:
    """Set `tie_word_embeddings` of the LLM's `config` false where the folder's files hold an LM head of its own.

    transformers does the same: it ties head and embedding only where the files hold one of them, or two equal tensors.
    rename: from the checkpoint's name of a tensor to ours. Missing files are ignored here; `weight_files` refuses them.
    """
    if not config.tie_word_embeddings:
        return
    found: dict[str, Tensor] = {}
    for path in filter(Path.is_file, _listed_files(folder)):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if rename(name) in (EMBEDDING, HEAD):
                    found[rename(name)] = file.get_tensor(name)
    if len(found) == 2 and not torch.equal(found[EMBEDDING], found[HEAD]):
        config.tie_word_embeddings = False


def read_tensors(
    folder: Path, config: PreTrainedConfig, rename: Callable[[str], str], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """All tensors of a base that are used, by file name. config: of its LLM. Raises what `read_safetensors` raises."""
    tensors: dict[str, Tensor] = {}
    original: dict[str, str] = {}
    for name, tensor in read_safetensors(folder, dtype).items():
        renamed = rename(name)
        if name.endswith(COMPUTED) or (renamed == HEAD and config.tie_word_embeddings):
            continue
        if renamed in tensors:
            raise ValueError(f"{folder} holds one tensor under two names, {original[renamed]!r} and {name!r}")
        if not tensor.is_floating_point():
            raise ValueError(
                unsupported(str(folder), f"tensor {name!r} of type {tensor.dtype}", "floating-point weights")
            )
        tensors[renamed], original[renamed] = tensor, name
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """`model.safetensors`, or the shards that model.safetensors.index.json lists.

    Raises FileNotFoundError when a file is missing and ValueError for a damaged index, or for weights as pickle.
    """
    files = _listed_files(folder)
    if not files:
        if any(folder.glob("*.bin")):
            raise ValueError(
                f"{folder} must hold its weights as safetensors, got pickle (.bin), which can run code when read; "
                "convert them, for example with transformers' save_pretrained"
            )
        raise FileNotFoundError(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}")
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, though {INDEX_NAME} lists it; copy it from the model's source")
    return files


def _listed_files(folder: Path) -> list[Path]:
    """The files that should hold the weights; an empty list without model.safetensors and without an index."""
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    index = folder / INDEX_NAME
    return [folder / name for name in shard_names(index)] if index.is_file() else []


def shard_names(index: Path) -> list[str]:
    """Names of the files, beside it, that an index of shards lists. Raises ValueError for a damaged index."""
    try:
        names = sorted(set(read_json_object(index, strict=False)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is damaged: {error!r}; copy it again from its source") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} is damaged: {name!r:.80} is not the name of a safetensors file beside it")
    return names


def read_safetensors(folder: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All tensors of the folder's `weight_files`, by the names they have there.

    Floating-point tensors are converted to `dtype` unless it is None. Raises FileNotFoundError when a file is missing
    and ValueError when one is damaged, or when two files hold the same tensor.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if name in tensors:
                    raise ValueError(f"{path} holds the tensor {name!r}, which another shard holds too")
                tensor = file.get_tensor(name)
                tensors[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    return tensors


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, whose errors name it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); copy it again from its source") from error
