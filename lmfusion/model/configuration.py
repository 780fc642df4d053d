"""What is a model made of? The configuration of its base, and one dataclass each for image tower, codec, diffusion."""

import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from lmfusion.model.codec import CodecConfig
from lmfusion.model.diffusion import DiffusionConfig
from lmfusion.model.patch_coder import PatchCoderConfig
from lmfusion.text.chat_template import check_template_variables
from lmfusion.utils.config_values import from_values, short_repr
from lmfusion_kernels.block.modules import SEPARATIONS


@dataclass
class ImageTowerConfig:
    """The tower that processes image tokens. Heads and head size are the text tower's, as attention is shared."""

    hidden_size: int | None = None
    """Width of the tower; None: the text tower's, which makes the tower start as a copy of it."""
    intermediate_size: int | None = None
    """Width of its feed-forward network; None: the text tower's, scaled with hidden_size to a multiple of 8."""
    separation: str = "deep"
    """"deep": own weights throughout; "shallow": own feed-forward network, attention shared with the text tower;
    "none": every layer shared (only embeddings, final norm and patch coder are the image side's own)."""
    patch_coder: PatchCoderConfig = field(default_factory=PatchCoderConfig)

    def __post_init__(self) -> None:
        self.patch_coder = from_values(PatchCoderConfig, self.patch_coder, "image.patch_coder")
        if self.separation not in SEPARATIONS:
            raise ValueError(
                f"image.separation is {short_repr(self.separation)}; it must be one of {', '.join(SEPARATIONS)}"
            )
        for name in ("hidden_size", "intermediate_size"):
            value = getattr(self, name)
            if value is not None:
                check_size(f"image.{name}", value)


class LMFusionConfig(PreTrainedConfig):
    """Configuration of an `LMFusion` model; saved as config.json.

    text_config: configuration of the base LLM, as transformers has it (Llama, Mistral, Qwen2, Qwen3). image, codec and
    diffusion may be given as dicts; unknown keys are errors. chat_system_prompt: the system's message of a chat that
    brings none of its own; None leaves that to the chat template. vlm_config: configuration of the vision-language
    model that the LLM is a part of (LLaVA, LLaVA-NeXT), whose text_config it shares and is saved without; None: the
    base is an LLM. template_variables: JSON values that the chat template reads by name, where a chat brings no others.
    """

    model_type: ClassVar[str] = "lmfusion"

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        image: ImageTowerConfig | dict[str, Any] | None = None,
        codec: CodecConfig | dict[str, Any] | None = None,
        diffusion: DiffusionConfig | dict[str, Any] | None = None,
        chat_system_prompt: str | None = None,
        vlm_config: PreTrainedConfig | dict[str, Any] | None = None,
        template_variables: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        unknown = set(kwargs) - _TRANSFORMERS_KEYS
        if unknown:
            known = "text_config, image, codec, diffusion, chat_system_prompt, vlm_config, template_variables"
            raise ValueError(f"unknown key {min(unknown)} (known: {known})")
        super().__init__(**{"architectures": ["LMFusion"], **kwargs})
        if text_config is None:
            text_config = {"model_type": "llama"}
        for section, values in (("text_config", text_config), ("vlm_config", vlm_config)):
            if isinstance(values, dict):
                check_limits(values, section)  # transformers makes lists of such lengths
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        if isinstance(vlm_config, dict):
            vlm_config = AutoConfig.for_model(**vlm_config, text_config=text_config.to_dict())
        self.vlm_config = vlm_config
        self.text_config = text_config if vlm_config is None else vlm_config.text_config
        self.image: ImageTowerConfig = from_values(ImageTowerConfig, image, "image")
        self.codec: CodecConfig = from_values(CodecConfig, codec, "codec")
        self.diffusion: DiffusionConfig = from_values(DiffusionConfig, diffusion, "diffusion")
        if chat_system_prompt is not None and not (isinstance(chat_system_prompt, str) and chat_system_prompt.strip()):
            raise ValueError(
                f"chat_system_prompt is {short_repr(chat_system_prompt)}; give a text, or None for the template's own"
            )
        self.chat_system_prompt = chat_system_prompt
        check_template_variables(template_variables or {})
        self.template_variables = dict(template_variables or {})
        self._check_sharing()

    def _check_sharing(self) -> None:
        shared = {
            "deep": [],
            "shallow": [("hidden_size", self.image_hidden_size)],
            "none": [("hidden_size", self.image_hidden_size), ("intermediate_size", self.image_intermediate_size)],
        }
        for name, value in shared[self.image.separation]:
            if value != (expected := getattr(self.text_config, name)):
                raise ValueError(
                    f"image.{name} is {value}, but with separation {self.image.separation!r} the image tower shares "
                    f"weights of the text tower, which has {expected}; leave it out, or use separation 'deep'"
                )

    @property
    def image_hidden_size(self) -> int:
        return self.image.hidden_size or self.text_config.hidden_size

    @property
    def image_intermediate_size(self) -> int:
        text = self.text_config
        if self.image.intermediate_size is not None:
            return self.image.intermediate_size
        if self.image_hidden_size == text.hidden_size:
            return text.intermediate_size
        return max(8, 8 * round(text.intermediate_size * self.image_hidden_size / text.hidden_size / 8))

    @property
    def head_dim(self) -> int:
        """Size of one attention head, in both towers."""
        return head_dim_of(self.text_config)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts all the way down, as config.json holds them."""
        output = super().to_dict()
        if self.vlm_config is not None:
            output["vlm_config"].pop("text_config")
        return {name: asdict(value) if is_dataclass_config(value) else value for name, value in output.items()}


_TRANSFORMERS_KEYS = {f.name for f in fields(PreTrainedConfig)} | {
    "model_type",
    "name_or_path",
    "_name_or_path",
    "attn_implementation",
    "torch_dtype",
    "num_labels",
    "output_attentions",
}


LIMITS = {"num_hidden_layers": 1000, "image_size": 65_536, "num_labels": 1_000_000}
"""Larger values are mistakes or attacks: building such a model would take forever."""
MAX_SIZE = 2**24
"""Of any other side of a weight."""
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)
"""What the configuration of an LLM gives as whole numbers."""


def check_size(name: str, value: Any, most: int = MAX_SIZE) -> None:
    """Raise ValueError unless `value` is an integer from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{name} is {short_repr(value)}; it must be an integer from 1 to {most:,}")


def check_limits(values: Any, name: str) -> None:
    """Raise ValueError, naming it, for a size in nested `values` that is too large to build a model of."""
    for key, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict):
            check_limits(value, f"{name}.{key}")
        elif isinstance(value, (int, float)):
            most = LIMITS.get(str(key), math.inf)
            if str(key).endswith(("_size", "_heads", "_layers", "_dim")):
                most = min(most, MAX_SIZE)
            if not value <= most:
                raise ValueError(f"{name}.{key} is {short_repr(value)}; it must be at most {most:,}")


def check_numbers(config: PreTrainedConfig) -> None:
    """Raise ValueError, naming it, for a number in the configuration of an LLM that cannot be right."""
    for name in SIZES:
        most = 2**62 if name == "max_position_embeddings" else LIMITS.get(name, MAX_SIZE)
        if hasattr(config, name):
            check_size(f"text_config.{name}", getattr(config, name), most)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ValueError(
            f"text_config.num_attention_heads is {heads}; it must be a multiple of num_key_value_heads, which is "
            f"{kv_heads}"
        )
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None and config.hidden_size % heads:
        raise ValueError(
            f"text_config.hidden_size is {config.hidden_size}; without head_dim it must be a multiple of "
            f"num_attention_heads, which is {heads}"
        )
    head_dim = config.hidden_size // heads if head_dim is None else head_dim
    check_size("text_config.head_dim", head_dim)
    if head_dim % 2:
        raise ValueError(f"text_config.head_dim is {head_dim}; it must be even, because RoPE rotates pairs")
    _check_positive("text_config.rms_norm_eps", config.rms_norm_eps)
    for name, value in (config.rope_parameters or {}).items():
        # llama3 and yarn have more, all of them factors
        if value is not None and not isinstance(value, (str, bool)):
            _check_positive(f"text_config.rope_parameters.{name}", value)


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {short_repr(value)}; it must be a positive number")


def head_dim_of(config: PreTrainedConfig) -> int:
    """Size of one attention head of a Llama-type LLM."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def is_dataclass_config(value: Any) -> bool:
    """Whether `value` is one of this package's configuration dataclasses (transformers' are dataclasses too)."""
    return is_dataclass(value) and not isinstance(value, (type, PreTrainedConfig))


AutoConfig.register(LMFusionConfig.model_type, LMFusionConfig)
