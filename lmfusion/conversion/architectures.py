"""Which LLMs can become a text tower? One check, so that what is not supported says so in one sentence."""

from transformers import PreTrainedConfig

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


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
