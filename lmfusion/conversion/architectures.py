"""Which LLMs can become a text tower? Checks of their configuration, before and after transformers reads it."""

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
LAYER_TYPES = ("full_attention", "sliding_attention")
SIZE_LIMITS = {
    "num_hidden_layers": 1_000,
    "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000,
    "head_dim": 10_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "vocab_size": 100_000_000,
    "max_position_embeddings": 10**10,
    "image_size": 10_000,
    "patch_size": 10_000,
    "num_channels": 1_000,
    "num_labels": 1_000_000,
}
"""What a configuration may ask for at most. Far above any real model; building what exceeds it may take hours."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_sizes(settings: Mapping[str, Any], where: str) -> None:
    """Raise ValueError naming a size in `settings` that no model has.

    settings: of a config.json, before anything is built from it; its text_config and vision_config are checked too.
    Values that are not numbers are left for transformers to reject, and None stands for its default.
    """
    for name, limit in SIZE_LIMITS.items():
        value = settings.get(name)
        if isinstance(value, (int, float)) and not (isinstance(value, int) and 1 <= value <= limit):
            raise ValueError(f"{where}: {name} must be a whole number from 1 to {limit}, got {value!r:.80}")
    for name in ("text_config", "vision_config"):
        part = settings.get(name)
        if isinstance(part, Mapping):
            check_sizes(part, f"{where}: {name}")


def check_supported(config: PreTrainedConfig, where: str) -> None:
    """Raise ValueError naming what in `config` (of the checkpoint at `where`) is not supported, and what is."""
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            unsupported(where, f"architecture {config.model_type!r}", f"Llama-type LLMs: {', '.join(MODEL_TYPES)}")
        )
    if config.hidden_act != "silu":
        raise ValueError(unsupported(where, f"activation {config.hidden_act!r}", "'silu'"))
    if getattr(config, "mlp_bias", False):
        raise ValueError(unsupported(where, "mlp_bias (biases in the feed-forward network)", "mlp_bias false"))
    if getattr(config, "attention_bias", False):
        raise ValueError(
            unsupported(where, "attention_bias (a bias on o_proj)", "biases on q, k and v alone, as in Qwen2")
        )
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise ValueError(unsupported(where, f"rope scaling {rope_type!r}", ", ".join(ROPE_TYPES)))
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(unsupported(where, "partial_rotary_factor other than 1", "heads rotated as a whole"))
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            unsupported(
                where, "quantised safetensors", "float32, float16 and bfloat16 checkpoints, and quantised GGUF files"
            )
        )
    _check_values(config, where)


def _check_values(config: PreTrainedConfig, where: str) -> None:
    """Raise ValueError naming a value in `config` with which no LLM can work."""
    sizes = {name: getattr(config, name, None) for name in SIZE_LIMITS}
    check_sizes(sizes, where)
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{where}: num_attention_heads must be a multiple of num_key_value_heads, got {num_heads} and "
            f"{num_kv_heads}; take config.json from the checkpoint's source"
        )
    head_dim = sizes["head_dim"] or config.hidden_size // num_heads
    if head_dim == 0 or head_dim % 2:
        raise ValueError(f"{where}: head_dim must be an even number, since RoPE rotates pairs, got {head_dim}")
    _check_positive({"rms_norm_eps": config.rms_norm_eps}, where)
    window = sliding_window(config)
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"{where}: sliding_window must be a whole number of at least 1, got {window!r:.80}")
    unknown = set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES)
    if unknown:
        raise ValueError(unsupported(where, f"layers of type {min(unknown)!r}", ", ".join(LAYER_TYPES)))
    rope = config.rope_parameters
    names = ["rope_theta"]
    if rope["rope_type"] != "default":
        names.append("factor")
    if rope["rope_type"] == "llama3":
        names += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    _check_positive({name: rope.get(name) for name in names}, where)
    if rope["rope_theta"] <= 1:
        raise ValueError(f"{where}: rope_theta must be above 1, got {rope['rope_theta']}")
    if rope["rope_type"] == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(
            f"{where}: low_freq_factor must be below high_freq_factor, got {rope['low_freq_factor']} and "
            f"{rope['high_freq_factor']}"
        )
    optional = ("beta_fast", "beta_slow", "attention_factor", "original_max_position_embeddings")
    _check_positive({name: rope[name] for name in optional if rope.get(name) is not None}, where)
    check_token_ids({name: getattr(config, name, None) for name in TOKEN_IDS}, config.vocab_size, where)


def _check_positive(values: Mapping[str, Any], where: str) -> None:
    for name, value in values.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{where}: {name} must be a finite number above 0, got {value!r:.80}")


def check_token_ids(ids: Mapping[str, Any], vocab_size: int, where: str) -> None:
    """Raise ValueError for an id, or one of a list of ids, that has no row in an embedding of `vocab_size` rows.

    -1 stands for none, as some checkpoints write it. BOI and EOI take the two ids after the vocabulary, so that an id
    beyond it would be one of them.
    """
    for name, value in ids.items():
        for token_id in value if isinstance(value, (list, tuple)) else [value]:
            if token_id is None or token_id == -1:
                continue
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"{where}: {name} is {token_id!r:.80}, but the embedding has vocab_size {vocab_size} rows, for ids "
                    f"from 0 to {vocab_size - 1}; correct {name}, or resize the embedding with transformers' "
                    "resize_token_embeddings"
                )


def unsupported(where: str, what: str, supported: str) -> str:
    """The one form of such an error."""
    return f"{where} uses {what}, which cannot become a text tower; supported: {supported}"


def sliding_window(config: PreTrainedConfig) -> int | None:
    """How far back the attention of some layer looks, in tokens; None where every layer sees everything."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return window
