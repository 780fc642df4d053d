"""The architectures that can become a text tower: checks of what transformers reads from their configurations."""

from transformers import PreTrainedConfig

from lmfusion.conversion.model_limits import check_llm_numbers, check_token_ids

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
LAYER_TYPES = ("full_attention", "sliding_attention")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
VLM_TYPES = ("llava_next", "llava")
"""Vision-language models, by the model_type of transformers."""
ENCODER_TYPES = ("clip_vision_model", "siglip_vision_model")


def check_supported(config: PreTrainedConfig, where: str) -> None:
    """Raise ValueError naming what in the LLM's `config` is not supported, and what is. where: the checkpoint."""
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
    check_llm_numbers(config, where)
    unknown = set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES)
    if unknown:
        raise ValueError(unsupported(where, f"layers of type {min(unknown)!r}", ", ".join(LAYER_TYPES)))
    check_token_ids({name: getattr(config, name, None) for name in TOKEN_IDS}, config.vocab_size, where)


def check_vlm(config: PreTrainedConfig, where: str) -> None:
    """Raise ValueError naming what in a VLM's `config` is not supported, and what is. where: the checkpoint."""
    supported = f"supported: {', '.join(VLM_TYPES)}, with a vision encoder of {' or '.join(ENCODER_TYPES)}"
    if config.model_type not in VLM_TYPES:
        raise ValueError(f"{where} is a vision-language model of type {config.model_type!r}; {supported}")
    vision, strategy = config.vision_config, config.vision_feature_select_strategy
    if vision.model_type not in ENCODER_TYPES:
        raise ValueError(f"{where} has a vision encoder of type {vision.model_type!r}; {supported}")
    # LLaVA-NeXT arranges the tokens of a tile in a square, so the class token must be left out where there is one
    expected = "default" if vision.model_type == "clip_vision_model" else "full"
    if config.model_type == "llava_next" and (strategy == "default") != (expected == "default"):
        raise ValueError(
            f"{where}: vision_feature_select_strategy must be {expected!r} with a vision encoder of type "
            f"{vision.model_type!r}, so that the tokens of a tile form a square, got {strategy!r}"
        )


def unsupported(where: str, what: str, supported: str) -> str:
    """The message for something that cannot become a text tower."""
    return f"{where} uses {what}, which cannot become a text tower; supported: {supported}"
