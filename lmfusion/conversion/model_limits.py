"""Limits on the sizes in a model's configuration, for base models and saved models alike.

Two checks: `check_sizes` looks at plain values before transformers builds anything from them, and `check_llm_numbers`
looks at the configuration that transformers made of them.
"""

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from lmfusion.utils.config_values import short_repr, truncate

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
MAX_OTHER_SIZE = 2**24
"""For every other key that ends like a size."""
_SIZE_ENDINGS = ("_size", "_heads", "_layers", "_dim")
_LLM_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
"""What the configuration of an LLM must give as whole numbers."""


def check_size(name: str, value: Any, most: int = MAX_OTHER_SIZE) -> None:
    """Raise ValueError unless `value` is an integer from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{name} must be a whole number from 1 to {most:,}, got {short_repr(value)}")


def check_sizes(settings: Mapping[str, Any], where: str) -> None:
    """Raise ValueError naming a size in `settings`, or in a mapping inside it, that no model has.

    settings: of a config.json, before anything is built from it: transformers makes lists of such lengths. Values that
    are not numbers are left for transformers to reject, and None stands for its default.
    """
    for key, value in settings.items():
        if isinstance(value, Mapping):
            check_sizes(value, f"{where}: {truncate(str(key))}")
        elif key in SIZE_LIMITS and isinstance(value, (int, float)):
            check_size(f"{where}: {key}", value, SIZE_LIMITS[key])
        elif isinstance(value, (int, float)) and str(key).endswith(_SIZE_ENDINGS) and not value <= MAX_OTHER_SIZE:
            raise ValueError(f"{where}: {key} must be at most {MAX_OTHER_SIZE:,}, got {short_repr(value)}")


def check_llm_numbers(config: PreTrainedConfig, where: str) -> None:
    """Raise ValueError naming a number in the configuration of an LLM with which it cannot work."""
    for name in _LLM_SIZES:
        check_size(f"{where}: {name}", getattr(config, name), SIZE_LIMITS[name])
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{where}: num_attention_heads must be a multiple of num_key_value_heads, got {num_heads} and "
            f"{num_kv_heads}; take config.json from the checkpoint's source"
        )
    if getattr(config, "head_dim", None) is None and config.hidden_size % num_heads:
        raise ValueError(
            f"{where}: hidden_size must be a multiple of num_attention_heads where there is no head_dim, got "
            f"{config.hidden_size} and {num_heads}; take config.json from the checkpoint's source"
        )
    head_dim = head_dim_of(config)
    check_size(f"{where}: head_dim", head_dim, SIZE_LIMITS["head_dim"])
    if head_dim % 2:
        raise ValueError(f"{where}: head_dim must be an even number, since RoPE rotates pairs, got {head_dim}")
    _check_positive(f"{where}: rms_norm_eps", config.rms_norm_eps)
    window = sliding_window(config)
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"{where}: sliding_window must be a whole number of at least 1, got {short_repr(window)}")
    _check_rope(config.rope_parameters, where)


def _check_rope(rope: Mapping[str, Any], where: str) -> None:
    needed = {"rope_theta"}
    if rope["rope_type"] != "default":
        needed.add("factor")
    if rope["rope_type"] == "llama3":
        needed |= {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    for name in sorted(needed | set(rope)):
        value = rope.get(name)
        # Beside names and switches, all that RoPE scalings have are factors and lengths
        if name in needed or (value is not None and not isinstance(value, (str, bool))):
            _check_positive(f"{where}: {name}", value)
    if rope["rope_theta"] <= 1:
        raise ValueError(f"{where}: rope_theta must be above 1, got {rope['rope_theta']}")
    if rope["rope_type"] == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(
            f"{where}: low_freq_factor must be below high_freq_factor, got {rope['low_freq_factor']} and "
            f"{rope['high_freq_factor']}"
        )


def _check_positive(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number above 0, got {short_repr(value)}")


def check_token_ids(ids: Mapping[str, Any], vocab_size: int, where: str) -> None:
    """Raise ValueError for an id, or an id in a list, that has no row in an embedding of `vocab_size` rows.

    -1 stands for none, as some checkpoints write it. BOI and EOI take the two ids after the vocabulary, so an id beyond
    it would be mistaken for one of them.
    """
    for name, value in ids.items():
        for token_id in value if isinstance(value, (list, tuple)) else [value]:
            if token_id is None or token_id == -1:
                continue
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"{where}: {name} must be a token id from 0 to {vocab_size - 1}, since the embedding has "
                    f"{vocab_size} rows, got {short_repr(token_id)}; correct {name}, or resize the embedding with "
                    "transformers' resize_token_embeddings"
                )


def head_dim_of(config: PreTrainedConfig) -> int:
    """Size of one attention head of a Llama-type LLM."""
    head_dim = getattr(config, "head_dim", None)
    return config.hidden_size // config.num_attention_heads if head_dim is None else head_dim


def sliding_window(config: PreTrainedConfig) -> int | None:
    """How far back the attention of some layer looks, in tokens; None where every layer sees everything."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return window
