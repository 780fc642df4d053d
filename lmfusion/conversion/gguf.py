"""How is a GGUF file read? Metadata to a transformers configuration, tensors dequantised and back in Llama's layout."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType, dequantize
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lmfusion.conversion.architectures import unsupported

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


def open_file(
    path: Path,
) -> tuple[PreTrainedConfig, Callable[[torch.dtype | None], dict[str, Tensor]], Callable[[], Any]]:
    """The configuration of the LLM in the GGUF file, and readers of its tensors (file names) and of its tokenizer.

    Raises ValueError for a damaged file or an architecture other than llama, qwen2 and qwen3.
    """
    try:
        reader = GGUFReader(path)
        scalars = {name: field for name, field in reader.fields.items() if field.types[:1] != [GGUFValueType.ARRAY]}
        metadata = {name: field.contents() for name, field in scalars.items()}
    except Exception as error:  # the reader slices the file without checks: any kind of error may come of a damaged one
        raise ValueError(f"{path} is truncated or no GGUF file ({error}); copy it again from its source") from error
    arrays = {tensor.name: tensor for tensor in reader.tensors}
    config = _read_config(path, metadata, arrays)

    def read_tensors(dtype: torch.dtype | None) -> dict[str, Tensor]:
        tensors = {}
        for name, array in arrays.items():
            if name == "rope_freqs.weight":  # already in the configuration
                continue
            tensor = torch.from_numpy(np.array(dequantize(array.data, array.tensor_type)))
            if metadata["general.architecture"] == "llama":
                if ".attn_q." in name:
                    tensor = _unpermute(tensor, config.num_attention_heads)
                elif ".attn_k." in name:
                    tensor = _unpermute(tensor, config.num_key_value_heads)
            tensors[_file_name(name)] = tensor.to(dtype or torch.float32)
        return tensors

    return config, read_tensors, lambda: _read_tokenizer(path, metadata)


def _read_tokenizer(path: Path, metadata: dict[str, Any]) -> Any:
    """The tokenizer in the file, chat template and all; None where there is none."""
    if "tokenizer.ggml.model" not in metadata:
        return None
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if metadata.get("tokenizer.ggml.pre") == "smollm":  # which transformers takes for GPT-2's
        splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    return tokenizer


def _read_config(path: Path, metadata: dict[str, Any], arrays: dict[str, Any]) -> PreTrainedConfig:
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            unsupported(str(path), f"architecture {architecture!r}", f"GGUF of {', '.join(ARCHITECTURES)}")
        )

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise ValueError(f"{path} lacks the metadata {architecture}.{key}; convert it again with llama.cpp")
        return value

    if f"{architecture}.expert_count" in metadata:
        raise ValueError(unsupported(str(path), "a mixture of experts", "dense LLMs"))
    if "token_embd.weight" not in arrays:
        raise ValueError(f"{path} lacks the tensor 'token_embd.weight'; is the file complete?")
    num_heads, hidden_size = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", hidden_size // num_heads)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(unsupported(str(path), "heads that RoPE rotates in part", "heads rotated as a whole"))
    window = metadata.get(f"{architecture}.attention.sliding_window")
    settings: dict[str, Any] = {
        "vocab_size": int(arrays["token_embd.weight"].shape[1]),
        "hidden_size": hidden_size,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": get("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in arrays,
        "rope_parameters": _rope_parameters(path, get, head_dim, arrays),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if window is not None:
        if architecture != "llama":
            raise ValueError(
                unsupported(str(path), f"a sliding window with {architecture!r}", "sliding windows in 'llama' files")
            )
        return AutoConfig.for_model("mistral", sliding_window=window, **settings)
    return AutoConfig.for_model(architecture, **settings)


def _rope_parameters(path: Path, get: Callable[..., Any], head_dim: int, arrays: dict[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(get("rope.freq_base", 10000.0))}
    kind = get("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": float(get("rope.scaling.factor"))}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
    elif kind != "none":
        raise ValueError(unsupported(str(path), f"rope scaling {kind!r}", "none, linear, yarn, llama3"))
    if "rope_freqs.weight" in arrays:
        rope |= _llama3_rope(path, np.asarray(arrays["rope_freqs.weight"].data), rope["rope_theta"], head_dim)
    return rope


def _llama3_rope(path: Path, divisors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's scaling, which GGUF stores as a table of divisors [D/2], back as its four numbers.

    Every published Llama has the same three besides `factor`, the largest divisor; the table tells whether they hold.
    """
    rope = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = AutoConfig.for_model(
        "llama",
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={**rope, "rope_theta": theta},
    )
    inv_freq, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if not np.allclose(plain / divisors, inv_freq.numpy(), rtol=1e-3):
        raise ValueError(unsupported(str(path), "rope_freqs that are not Llama 3's", "Llama 3's scaling"))
    return rope


def _file_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        return name  # reported as unexpected by its own name
    return f"text.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def _unpermute(tensor: Tensor, num_heads: int) -> Tensor:
    """Undo llama.cpp's order of q and k rows: it interleaves the two halves that RoPE pairs, Llama keeps them apart."""
    rows = tensor.shape[0]
    return tensor.unflatten(0, (num_heads, rows // num_heads // 2, 2)).transpose(1, 2).reshape(tensor.shape)
