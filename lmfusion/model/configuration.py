"""The configuration of a model: that of its base, and a dataclass each for image tower, codec and diffusion."""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from lmfusion.conversion.model_limits import check_size, check_sizes, head_dim_of
from lmfusion.model.codec import CodecConfig
from lmfusion.model.diffusion import DiffusionConfig
from lmfusion.model.patch_coder import PatchCoderConfig
from lmfusion.text.chat_template import check_template_variables
from lmfusion.utils.config_values import from_values, short_repr
from lmfusion_kernels.block.modules import SEPARATIONS


@dataclass
class ImageTowerConfig:
    """The tower that processes image tokens. It has the text tower's heads and head size, as attention is shared."""

    hidden_size: int | None = None
    """Width of the tower; None: the text tower's, and the tower starts as a copy of it."""
    intermediate_size: int | None = None
    """Width of its feed-forward network; None: the text tower's, scaled with hidden_size to a multiple of 8."""
    separation: str = "deep"
    """"deep": own weights throughout; "shallow": own feed-forward network, attention shared with the text tower;
    "none": all layers shared (only embeddings, final norm and patch coder are the image side's own)."""
    patch_coder: PatchCoderConfig = field(default_factory=PatchCoderConfig)

    def __post_init__(self) -> None:
        self.patch_coder = from_values(PatchCoderConfig, self.patch_coder, "image.patch_coder")
        if self.separation not in SEPARATIONS:
            raise ValueError(
                f"image.separation must be one of {', '.join(SEPARATIONS)}, got {short_repr(self.separation)}"
            )
        for name in ("hidden_size", "intermediate_size"):
            value = getattr(self, name)
            if value is not None:
                check_size(f"image.{name}", value)


class LMFusionConfig(PreTrainedConfig):
    """Configuration of an `LMFusion` model; saved as config.json.

    text_config: transformers' configuration of the base LLM (Llama, Mistral, Qwen2, Qwen3). image, codec and diffusion
    may be dicts; unknown keys are errors. chat_system_prompt: the system message of chats without one; None leaves that
    to the chat template. vlm_config: configuration of the vision-language model that the LLM is a part of (LLaVA,
    LLaVA-NeXT); it shares `text_config`, and is saved without it; None: the base is an LLM. template_variables: JSON
    values that the chat template reads by name, unless a chat gives its own.
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
                check_sizes(values, section)
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
                "chat_system_prompt must be a text, or None for the template's own, got "
                f"{short_repr(chat_system_prompt)}"
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
                    f"image.{name} must be the text tower's {expected} with separation {self.image.separation!r}, "
                    f"since the towers share weights, got {value}; leave it out, or use separation 'deep'"
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
        """Nested plain dicts, as config.json holds them."""
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


def is_dataclass_config(value: Any) -> bool:
    """Whether `value` is one of this package's configuration dataclasses (transformers' are dataclasses too)."""
    return is_dataclass(value) and not isinstance(value, (type, PreTrainedConfig))
