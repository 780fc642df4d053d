"""Finds the sizes of a run's model without its weights: from configuration files, or from presets of known LLMs."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlavaNextConfig, PreTrainedConfig
from transformers.initialization import no_init_weights

from lmfusion.conversion import gguf, huggingface, vlm
from lmfusion.conversion.architectures import check_supported
from lmfusion.model.codec import CodecConfig
from lmfusion.model.configuration import LMFusionConfig
from lmfusion.model.flops import products_of
from lmfusion.model.saved_files import read_config
from lmfusion.model.vision import VisionEncoder
from lmfusion.planning.model_shape import CodecShape, ModelShape
from lmfusion.training.config import ModelConfig
from lmfusion.utils.recipes import resolve_path

LLMS: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}
"""Sizes of LLMs by name, for plans without their files."""
LLMS["llama3-llava-next-8b"] = LLMS["llama3-8b"] | {"vocab_size": 128320}
VLMS = ("llama3-llava-next-8b",)
"""The LLMS that belong to a LLaVA-NeXT, with a CLIP-L of 336 pixels."""


def model_shape(model: ModelConfig, llm: str | None = None) -> ModelShape:
    """Sizes of the model that a run starts from. llm, errors: as in `model_config`."""
    config = model_config(model, llm)
    return ModelShape(config, codec_shape(config.codec), vision_parameters(config))


def model_config(model: ModelConfig, llm: str | None = None) -> LMFusionConfig:
    """The configuration of the model that a run starts from. llm: a name in LLMS, instead of the recipe's base.

    Raises FileNotFoundError if there is no model at model.adapted, or no LLM at model.base and `llm` is None, and
    ValueError for configurations that cannot be read, are not supported or do not fit together.
    """
    if model.adapted is not None:
        return read_config(Path(resolve_path(model.adapted)), model.codec_path)[1]
    assert model.base is not None
    llm_config, vlm_config = _base_configs(model.base, llm)
    return LMFusionConfig(llm_config, model.image, model.codec, model.diffusion, vlm_config=vlm_config)


def vision_parameters(config: LMFusionConfig) -> int:
    """Parameters of a vision-language model's vision encoder and projector; 0 for an LLM."""
    if config.vlm_config is None:
        return 0
    with no_init_weights():
        return sum(p.numel() for p in VisionEncoder(config.vlm_config, device="meta").parameters())


def _base_configs(base: str, llm: str | None) -> tuple[PreTrainedConfig, PreTrainedConfig | None]:
    """The configurations of the LLM, and of the vision-language model that it belongs to, if any."""
    if llm is not None:
        named = LlamaConfig(**LLMS[llm])
        return named, LlavaNextConfig(text_config=named) if llm in VLMS else None
    path = Path(resolve_path(base)).expanduser()
    if path.is_dir() and vlm.is_vlm(path):
        vlm_config = vlm.read_config(path)
        check_supported(vlm_config.text_config, str(path))
        return vlm_config.text_config, vlm_config
    if path.is_dir():
        config = huggingface.read_config(path)
    elif path.is_file():
        config = gguf.open_file(path)[0]
    else:
        raise FileNotFoundError(
            f"no base LLM at {base}; put it there, change model.base, or choose sizes with --llm ({', '.join(LLMS)})"
        )
    check_supported(config, str(path))
    return config, None


def codec_shape(config: CodecConfig) -> CodecShape:
    """Sizes of the codec, from its configuration file. If there is none, Transfusion's are assumed: 8 channels,
    an eighth of each side, 86 M parameters.

    Raises ValueError for a configuration that cannot be read, and for sizes that do not fit together.
    """
    size = config.image_size
    if config.kind == "pixels":
        return CodecShape((config.channels, size, size))
    assert config.path is not None
    path = Path(config.path).expanduser() / "config.json"
    if not path.is_file():
        return CodecShape((8, size // 8, size // 8), 86_000_000, is_assumed=True)
    import diffusers

    kind: Any = {"autoencoder_kl": diffusers.AutoencoderKL, "autoencoder_tiny": diffusers.AutoencoderTiny}[config.kind]
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        with torch.device("meta"), torch.no_grad():
            autoencoder = kind.from_config(settings)
            images = torch.empty(1, config.channels, size, size)
            latents: list[Any] = []
            products = products_of(autoencoder, lambda: latents.append(autoencoder.encode(images)))
    except Exception as error:  # json, diffusers and torch raise all kinds of errors on bad settings
        raise ValueError(
            f"{path} must be the configuration of an {kind.__name__} for images of {size} pixels: {error}"
        ) from error
    encoded = latents[0].latents if config.kind == "autoencoder_tiny" else latents[0].latent_dist.mode()
    num_parameters = sum(parameter.numel() for parameter in autoencoder.parameters())
    return CodecShape(tuple(encoded.shape[1:]), num_parameters, sum(flops for flops, _ in products))
