"""Reads LLMs from GGUF files: a transformers configuration from the metadata, and tensors in Llama's layout."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lmfusion.conversion.architectures import unsupported
from lmfusion.conversion.gguf_header import GGUFFile, read_header
from lmfusion.conversion.gguf_tokenizer import end_tokens, read_tokenizer, special_ids
from lmfusion.conversion.model_limits import check_sizes

ARCHITECTURES = ("llama", "qwen2", "qwen3")

_TOP_NAMES = {
    "token_embd.weight": "text.embed_tokens.weight",
    "output_norm.weight": "text.norm.weight",
    "output.weight": "text.lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_TABLE = "rope_freqs.weight"
_SIZE_NAMES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
}
_READ = {
    *_SIZE_NAMES,
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
}
_HARMLESS = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_beta_fast": (32,),
    "rope.scaling.yarn_beta_slow": (1,),
}
"""Keys, and their values that change nothing. Other values would change what the model computes."""


def open_file(
    path: Path,
) -> tuple[PreTrainedConfig, Callable[[torch.dtype | None], dict[str, Tensor]], Callable[[], Any]]:
    """The configuration of the LLM in the GGUF file, and readers of its tensors (file names) and of its tokenizer.

    Raises ValueError for a damaged file, for an architecture other than llama, qwen2 and qwen3, and for metadata that
    changes what the model computes and is not supported.
    """
    file = read_header(path)
    architecture = _architecture(file)
    config = _read_config(file, architecture)

    def read_tensors(dtype: torch.dtype | None) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name in file.tensors:
            if name == _ROPE_TABLE:  # it is in the configuration already
                continue
            tensor = torch.from_numpy(file.read(name))
            if architecture == "llama":
                if ".attn_q." in name:
                    tensor = _unpermute(tensor, config.num_attention_heads, name, path)
                elif ".attn_k." in name:
                    tensor = _unpermute(tensor, config.num_key_value_heads, name, path)
            tensors[_file_name(name)] = tensor.to(dtype or torch.float32)
        return tensors

    return config, read_tensors, lambda: read_tokenizer(path, file.metadata)


def _architecture(file: GGUFFile) -> str:
    """The file's architecture, after checking every key of its metadata about the model."""
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            unsupported(str(file.path), f"architecture {architecture!r}", f"GGUF of {', '.join(ARCHITECTURES)}")
        )
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise ValueError(
            f"{file.path} must hold a whole model, got one of several parts; join them with llama.cpp's gguf-split"
        )
    for key, value in file.metadata.items():
        prefix, _, name = key.partition(".")
        if prefix != architecture or name in _READ or name in _HARMLESS or value in _NEUTRAL.get(name, ()):
            continue
        if name == "expert_count":
            raise ValueError(unsupported(str(file.path), "a mixture of experts", "dense LLMs"))
        supported = ", ".join(map(str, _NEUTRAL[name])) if name in _NEUTRAL else "files without it"
        raise ValueError(unsupported(str(file.path), f"the metadata {key} = {value!r:.80}", supported))
    return str(architecture)


def _read_config(file: GGUFFile, architecture: str) -> PreTrainedConfig:
    path = file.path

    def get(key: str, default: Any = None) -> Any:
        value = file.metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise ValueError(f"{path} lacks the metadata {architecture}.{key}; convert it again with llama.cpp")
        if isinstance(value, list):  # one value for each layer
            if len(set(value)) != 1:
                raise ValueError(
                    unsupported(str(path), f"a different {architecture}.{key} in each layer", "the same in all layers")
                )
            return value[0]
        return value

    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{path} lacks the tensor 'token_embd.weight'; is the file complete?")
    num_heads, hidden_size = get("attention.head_count"), get("embedding_length")
    if not isinstance(num_heads, int) or not isinstance(hidden_size, int) or num_heads < 1:
        raise ValueError(
            f"{path}: head_count and embedding_length must be whole numbers, got {num_heads!r:.80} and "
            f"{hidden_size!r:.80}"
        )
    head_dim = get("attention.key_length", hidden_size // num_heads)
    sizes = {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": get("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
    }
    check_sizes(sizes, str(path))
    if get("attention.value_length", head_dim) != head_dim:
        raise ValueError(unsupported(str(path), "values of another length than keys", "the same length of both"))
    if get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(unsupported(str(path), "heads that RoPE rotates in part", "heads rotated as a whole"))
    try:
        special, ends = special_ids(file.metadata), end_tokens(file.metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    settings: dict[str, Any] = {
        **sizes,
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope_parameters(file, get, head_dim),
        "bos_token_id": special.get("bos"),
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
    }
    model_type = architecture
    window = file.metadata.get(f"{architecture}.attention.sliding_window", 0)
    if window != 0:
        if architecture != "llama":
            raise ValueError(
                unsupported(str(path), f"a sliding window with {architecture!r}", "sliding windows in 'llama' files")
            )
        model_type, settings["sliding_window"] = "mistral", window
    try:
        return AutoConfig.for_model(model_type, **settings)
    except Exception as error:  # whatever transformers raises on values of the wrong type
        raise ValueError(f"{path} holds metadata that transformers cannot read: {error}") from error


def _rope_parameters(file: GGUFFile, get: Callable[..., Any], head_dim: int) -> dict[str, Any]:
    """RoPE settings from the keys that llama.cpp reads. Like llama.cpp, a factor without a type scales linearly."""
    where = str(file.path)

    def number(key: str, default: float) -> float:
        value = get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{where}: {key} must be a number, got {value!r:.80}")
        return float(value)

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": number("rope.freq_base", 10000.0)}
    kind = get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(unsupported(where, f"rope scaling {kind!r}", "none, linear, yarn, llama3"))
    factor = number("rope.scaling.factor", number("rope.scale_linear", 0.0)) or 1.0  # 0 means no scaling
    attention_factor = number("rope.scaling.attn_factor", 1.0)
    if kind == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": get("rope.scaling.original_context_length", get("context_length")),
        }
        if attention_factor != 1.0:
            rope["attention_factor"] = attention_factor * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    elif attention_factor != 1.0:
        raise ValueError(unsupported(where, f"rope.scaling.attn_factor with rope scaling {kind!r}", "that with yarn"))
    elif kind == "linear" and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    if _ROPE_TABLE in file.tensors:
        divisors = file.read(_ROPE_TABLE)
        if divisors.shape != (head_dim // 2,):
            raise ValueError(f"{where}: {_ROPE_TABLE} must hold {head_dim // 2} values, got {divisors.shape}")
        if np.any(divisors != 1.0):
            if rope["rope_type"] != "default":
                raise ValueError(unsupported(where, f"{_ROPE_TABLE} with rope scaling {kind!r}", "one of the two"))
            rope |= _llama3_rope(where, divisors, rope["rope_theta"], head_dim)
    return rope


def _llama3_rope(where: str, divisors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's scaling, which GGUF stores as a table of divisors [D/2], as its four numbers.

    `factor` is the largest divisor. The other three are the same in every published Llama; the table confirms them.
    """
    rope = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    error = ValueError(unsupported(where, "rope_freqs that are not Llama 3's", "Llama 3's scaling"))
    if not np.isfinite(divisors).all() or divisors.min() <= 0:
        raise error
    config = AutoConfig.for_model(
        "llama",
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={**rope, "rope_theta": theta},
    )
    inv_freq, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if not np.allclose(plain / divisors, inv_freq.numpy(), rtol=1e-3):
        raise error
    return rope


def _file_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        return name  # it is reported as unexpected by its own name
    return f"text.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def _unpermute(tensor: Tensor, num_heads: int, name: str, path: Path) -> Tensor:
    """Undo llama.cpp's order of q and k rows, which interleaves the two halves that RoPE pairs."""
    rows = tensor.shape[0]
    if rows % (2 * num_heads):
        raise ValueError(f"{path}: {name!r} must have a multiple of {2 * num_heads} rows, got {rows}")
    return tensor.unflatten(0, (num_heads, rows // num_heads // 2, 2)).transpose(1, 2).reshape(tensor.shape)
