"""The identity of a run: what may not change when it is resumed, by its key in the configuration."""

from collections.abc import Iterable, Mapping
from typing import Any

from lmfusion.data.config import SourceConfig
from lmfusion.data.latent_cache.format import tokenizer_sha256
from lmfusion.model.assembly import base_tensors
from lmfusion.model.modeling import LMFusion
from lmfusion.model.records import tensor_digests
from lmfusion.text.chat_template import uses_date
from lmfusion.training.config import RunConfig
from lmfusion.utils.config_values import to_values
from lmfusion.utils.hashing import values_sha256

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
"""Keys in the config.json of an LLM that the shapes of its tensors do not imply."""
VLM_KEYS = ("image_grid_pinpoints", "projector_hidden_act", "vision_feature_layer", "vision_feature_select_strategy")
"""The same for a vision-language model."""


def run_identity(config: RunConfig, model: LMFusion, num_samples: int) -> dict[str, Any]:
    """Everything that the numbers of a run depend on and that may not change when it is resumed, as JSON values.

    num_samples: of all its sources. Folders may be moved; the number of ranks and workers, the schedule, and the
    settings of logs, samples and checkpoints may change.
    """
    sections = {"image": model.config.image, "codec": model.config.codec, "diffusion": model.config.diffusion}
    identity: dict[str, Any] = {f"model.{name}": to_values(section) for name, section in sections.items()}
    identity["model.codec"].pop("path")  # its digest may not change
    identity |= {f"train.{key}": getattr(config.train, key) for key in TRAIN_KEYS}
    identity |= {f"data.{key}": getattr(config.data, key) for key in DATA_KEYS}
    identity["data.sources"] = sources_identity(config.data.sources)
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


def sources_identity(sources: Iterable[SourceConfig]) -> list[dict[str, Any]]:
    """The values of `sources` without their paths, since folders may be moved."""
    return [{key: value for key, value in to_values(source).items() if key != "path"} for source in sources]


def check_identity(identity: Mapping[str, Any], saved: Mapping[str, Any], path: Any) -> None:
    """Raises ValueError if `saved`, the identity in the checkpoint at `path`, differs from `identity`."""
    changed = [key for key in identity.keys() | saved.keys() if saved.get(key) != identity.get(key)]
    if DATE not in saved:  # the run has begun before dates were kept
        changed = [key for key in changed if key != DATE]
    if "train.dtype" in changed:  # the digests of the base LLM's tensors change with it
        changed = [key for key in changed if key != "base LLM"]
    if changed == ["base LLM"]:
        raise ValueError(f"{path} belongs to another base LLM; set model.base to the one that the run began with")
    if changed:
        was = ", ".join(f"{key} was {saved.get(key)!r}, is {identity.get(key)!r}" for key in sorted(changed))
        raise ValueError(f"{path} belongs to another run: {was}. Change it back, or set output to another folder")


def is_text_the_bases(model: LMFusion) -> bool:
    """Whether the text tower certainly equals the base LLM's, so that the model can be saved without it."""
    return model.base is not None and not model.base.may_differ


def base_digest(model: LMFusion) -> str:
    """One digest of the text tower that the run started from, and of a vision-language model's vision encoder."""
    if not model.frozen_text:  # training has changed the text tower; the checkpoint holds it
        sha256 = {} if model.base is None else model.base.sha256
    elif is_text_the_bases(model):
        assert model.base is not None
        sha256 = model.base.sha256
    else:
        sha256 = tensor_digests(base_tensors(model))
    return values_sha256(sha256)
