"""Is this the run that a checkpoint belongs to? What it cannot change on the way, by its key in the configuration."""

from collections.abc import Mapping
from typing import Any

from lmfusion.data.latent_cache.format import tokenizer_sha256
from lmfusion.model.modeling import LMFusion
from lmfusion.model.saving import base_tensors, digests
from lmfusion.text.chat_template import uses_date
from lmfusion.training.config import RunConfig
from lmfusion.utils.config_values import to_values, values_sha256

TRAIN_KEYS = ("seed", "batch_tokens", "text_learning_rate_ratio", "optimizer", "dtype")
DATA_KEYS = (
    "seq_len",
    "pack_window",
    "shuffle_blocks",
    "image_first",
    "caption_drop",
    "max_caption_tokens",
    "sample_latents",
)
DATE = "data.today"

LLM_KEYS = ("rms_norm_eps", "rope_parameters")
"""What the config.json of an LLM says beside the shapes of its tensors."""
VLM_KEYS = ("image_grid_pinpoints", "projector_hidden_act", "vision_feature_layer", "vision_feature_select_strategy")
"""The same of a vision-language model."""


def run_identity(config: RunConfig, model: LMFusion, num_samples: int) -> dict[str, Any]:
    """Everything that the numbers of a run depend on and that may not change when it is resumed, as JSON values.

    num_samples: of all its sources. Folders may be moved; the number of ranks and workers, the schedule, and what is
    logged, drawn and saved may change.
    """
    sections = {"image": model.config.image, "codec": model.config.codec, "diffusion": model.config.diffusion}
    identity: dict[str, Any] = {f"model.{name}": to_values(section) for name, section in sections.items()}
    identity["model.codec"].pop("path")  # its digest may not change
    identity |= {f"train.{key}": getattr(config.train, key) for key in TRAIN_KEYS}
    identity |= {f"data.{key}": getattr(config.data, key) for key in DATA_KEYS}
    sources = [to_values(source) for source in config.data.sources]
    identity["data.sources"] = [{k: v for k, v in source.items() if k != "path"} for source in sources]
    llm = model.config.text_config
    identity["the LLM's config.json"] = {key: getattr(llm, key) for key in LLM_KEYS}
    if model.vision is not None:
        identity["the VLM's config.json"] = {key: getattr(model.vision.config, key, None) for key in VLM_KEYS}
    if model.config.template_variables:
        identity["model.template_variables"] = model.config.template_variables
    if config.data.today is not None and uses_date(model.tokenizer):
        identity[DATE] = config.data.today
    identity["the LLM's tokenizer"] = tokenizer_sha256(model.tokenizer)
    return identity | {"number of samples": num_samples, "base LLM": base_digest(model)}


def check_identity(identity: Mapping[str, Any], saved: Mapping[str, Any], path: Any) -> None:
    """Raises ValueError where `saved`, of the checkpoint at `path`, names another run than `identity`."""
    changed = [key for key in identity.keys() | saved.keys() if saved.get(key) != identity.get(key)]
    if DATE not in saved:  # of a run that began when dates were not kept
        changed = [key for key in changed if key != DATE]
    if "train.dtype" in changed:  # which the digests of its tensors follow
        changed = [key for key in changed if key != "base LLM"]
    if changed == ["base LLM"]:
        raise ValueError(f"{path} belongs to another base LLM; point model.base to the one it was made with")
    if changed:
        was = ", ".join(f"{key} was {saved.get(key)!r}, is {identity.get(key)!r}" for key in sorted(changed))
        raise ValueError(f"{path} belongs to another run: {was}. Change it back, or set output to another folder")


def is_text_the_bases(model: LMFusion) -> bool:
    """Whether the text tower is certainly the base LLM's: then the model is saved without it."""
    return model.base is not None and not model.base.may_differ


def base_digest(model: LMFusion) -> str:
    """One digest of the text tower that the run started from, and of what a vision-language model sees with."""
    if not model.frozen_text:  # it has moved on since; the checkpoint holds it
        sha256 = {} if model.base is None else model.base.sha256
    elif is_text_the_bases(model):
        assert model.base is not None
        sha256 = model.base.sha256
    else:
        sha256 = digests(base_tensors(model))
    return values_sha256(sha256)
