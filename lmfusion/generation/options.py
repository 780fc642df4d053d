"""The options of an answer: name, type, range, default and help of each, and the limits of a request.

The command line is made from `OPTIONS`; tests compare the server's fields and the table in docs/generation.md with it.
The module imports nothing heavy, so that `lmfusion --help` answers at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from lmfusion.utils.config_values import check_type, short_repr

if TYPE_CHECKING:
    from torch import Tensor

SAMPLERS = ("ddpm", "ddim", "dpm-solver")
MAX_STOP_STRINGS = 16
MAX_GUIDANCE = 1000
MIN_TOP_P, MAX_TOP_K = 1e-6, 10**6
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3
StepCallback = Callable[[int, int, dict[str, "Tensor"]], Mapping[str, "Tensor"] | None]
"""(step, timestep, {"latents": [C, h, w]}) -> None, or {"latents": ...} to continue from instead."""
Group = Literal["text", "conversation", "answer", "image", "all"]
"""What an option is about: text, conversations, answers that mix text and images, images, or all of these."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option, as the command line, the server and the guide present it."""

    name: str
    kind: Any
    """Its type, as annotated in `GenerationOptions`."""
    default: Any
    help: str
    group: Group
    least: float | None = None
    most: float | None = None
    allowed: str = ""
    """Allowed values in words; "" if every value of the type is allowed."""
    flag: str | None = None
    """On the command line of `lmfusion generate`; None if it has none."""
    request_name: str | None = None
    """Field of a chat request: OpenAI's name where there is one. None if requests do not have the option."""

    @property
    def value_type(self) -> type:
        """`kind` without None and without what is inside: bool, int, float, str, tuple (a pair), list or dict."""
        kinds = get_args(self.kind) if isinstance(self.kind, UnionType) else (self.kind,)
        kind = [kind for kind in kinds if kind is not NoneType][-1]
        origin: Any = get_origin(kind) or kind
        return {Mapping: dict, Any: str}.get(origin, origin)  # a sampler is given by its name

    def check(self, value: Any) -> None:
        """Raise ValueError for a value of the wrong type, or outside `least` to `most`."""
        check_type(value, self.kind, self.name)
        if value is None or self.least is None:
            return
        if not self.least <= value <= (float("inf") if self.most is None else self.most):
            raise ValueError(f"{self.name} must be {self.allowed}, got {short_repr(value)}")


def _about(
    help: str,
    group: Group,
    *,
    least: float | None = None,
    most: float | None = None,
    allowed: str = "",
    flag: str | None = "",
    request_name: str | None = "",
) -> dict[str, Any]:
    """Metadata of a field of `GenerationOptions`.

    flag, request_name: "" takes the field's name, None leaves the option out.
    """
    if least is not None:
        allowed = f"at least {least:,}" if most is None else f"between {least:,} and {most:,}"
    values = {"help": help, "group": group, "least": least, "most": most, "allowed": allowed}
    return values | {"flag": flag, "request_name": request_name}


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Options of one answer. Raises ValueError for a value of the wrong type or out of range."""

    max_new_tokens: int = field(
        default=256,
        metadata=_about(
            "maximum number of text tokens; images count separately", "text", least=0, request_name="max_tokens"
        ),
    )
    do_sample: bool | None = field(
        default=None,
        metadata=_about(
            "true: sample, at temperature 1 if none is given; false: take the most likely one; unset: the temperature "
            "decides",
            "text",
            flag=None,
            request_name=None,
        ),
    )
    temperature: float = field(
        default=0.0,
        metadata=_about(
            "randomness of the text; 0: always the most likely token",
            "text",
            allowed=f"0 or between {MIN_TEMPERATURE:g} and {MAX_TEMPERATURE:g}",
        ),
    )
    top_p: float = field(
        default=1.0,
        metadata=_about(
            "sample from the top tokens that together have this probability", "text", least=MIN_TOP_P, most=1
        ),
    )
    top_k: int = field(
        default=0,
        metadata=_about("sample from this number of top tokens; 0: from all", "text", least=0, most=MAX_TOP_K),
    )
    stop_strings: tuple[str, ...] | list[str] = field(
        default=(),
        metadata=_about(
            "text that ends the answer and is not part of it; a control token's name stands for that token",
            "text",
            allowed=f"at most {MAX_STOP_STRINGS} texts, none empty",
            flag="--stop",
            request_name="stop",
        ),
    )
    template_variables: Mapping[str, Any] = field(
        default_factory=dict,
        metadata=_about(
            "JSON value that the chat template reads by name, over those saved with the model; `today` is the date",
            "conversation",
            flag="--template-variable",
            request_name="chat_template_kwargs",
        ),
    )

    max_images: int = field(
        default=0,
        metadata=_about("maximum number of images; 0: text only, every word the base LLM's", "answer", least=0),
    )
    min_images: int = field(
        default=0,
        metadata=_about(
            "minimum number of images; text that ends too early is followed by an image", "answer", least=0
        ),
    )
    draw_first: bool = field(default=False, metadata=_about("begin with an image instead of text", "answer", flag=None))

    num_steps: int = field(default=50, metadata=_about("denoising steps of an image", "image", least=1))
    sampler: Any = field(
        default="ddpm",
        metadata=_about(
            "ddpm, ddim, or dpm-solver, which needs the fewest steps; in Python also a diffusers scheduler",
            "image",
            allowed=", ".join(SAMPLERS),
        ),
    )
    guidance_scale: float = field(
        default=1.55,
        metadata=_about("how closely to follow the prompt; 1: no guidance", "image", least=0, most=MAX_GUIDANCE),
    )
    image_guidance_scale: float | None = field(
        default=None,
        metadata=_about(
            "how closely to follow the images in the prompt; 1: guide by the text alone; unset: by both together",
            "image",
            least=0,
            most=MAX_GUIDANCE,
        ),
    )
    guidance_interval: tuple[float, float] = field(
        default=(0.0, 1.0),
        metadata=_about(
            "guide only between these shares of the noise levels, 1 being pure noise",
            "image",
            allowed="low and high with 0 <= low <= high <= 1",
        ),
    )
    guidance_rescale: float = field(
        default=0.0,
        metadata=_about("how much of the contrast that guidance adds to take back", "image", least=0, most=1),
    )
    negative_prompt: str | None = field(
        default=None, metadata=_about("what to keep away from: the prompt that guidance leads away from", "image")
    )
    image_size: int | None = field(
        default=None,
        metadata=_about(
            "pixels per side of a generated image; unset: the size the model was trained with", "image", least=1
        ),
    )
    preview_every: int = field(
        default=0, metadata=_about("denoising steps between two previews; 0: no previews", "image", least=0)
    )
    callback_on_step_end: StepCallback | None = field(
        default=None,
        metadata=_about(
            "called after every denoising step of every image; it may replace the latents",
            "image",
            flag=None,
            request_name=None,
        ),
    )

    seed: int = field(
        default=0,
        metadata=_about(
            "the same seed gives the same answer, alone or in a batch, on the same device and versions", "all", least=0
        ),
    )

    def __post_init__(self) -> None:
        from lmfusion.text.chat_template import check_template_variables  # imports transformers

        for name in _CHECKED:
            OPTIONS[name].check(getattr(self, name))
        check_template_variables(self.template_variables)
        self._check_text()
        self._check_images()

    def _check_text(self) -> None:
        if not (self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE):
            raise ValueError(f"temperature must be {OPTIONS['temperature'].allowed}, got {self.temperature}")
        if self.do_sample is False and self.temperature > 0:
            raise ValueError(
                f"do_sample must not be False with a temperature, got temperature {self.temperature}; leave one out"
            )
        if len(self.stop_strings) > MAX_STOP_STRINGS or not all(self.stop_strings):
            raise ValueError(
                f"stop_strings must be {OPTIONS['stop_strings'].allowed}, got {short_repr(self.stop_strings)}"
            )

    def _check_images(self) -> None:
        if self.min_images > self.max_images:
            raise ValueError(
                f"min_images must be at most max_images ({self.max_images}), got {self.min_images}; raise max_images"
            )
        if self.draw_first and not self.max_images:
            raise ValueError("max_images must be at least 1 with draw_first, got 0; raise max_images")
        if self.max_images == 0 and self.max_new_tokens == 0:
            raise ValueError("max_new_tokens or max_images must be at least 1, got 0 for both: nothing to generate")
        if self.max_new_tokens == 0 and not (self.draw_first or self.min_images):
            raise ValueError(
                "max_new_tokens must be at least 1 where text begins the answer, got 0; set draw_first or min_images"
            )
        if self.callback_on_step_end is not None and not callable(self.callback_on_step_end):
            raise ValueError(f"callback_on_step_end must be a function, got {short_repr(self.callback_on_step_end)}")
        if isinstance(self.sampler, str) and self.sampler not in SAMPLERS:
            raise ValueError(unknown_sampler(self.sampler))
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"guidance_interval must be {OPTIONS['guidance_interval'].allowed}, got {self.guidance_interval}"
            )

    @property
    def text_temperature(self) -> float:
        """The temperature in force: `temperature`, or 1 if `do_sample` is set without one."""
        return 1.0 if self.do_sample and self.temperature == 0 else self.temperature

    @property
    def is_guided(self) -> bool:
        """Whether an image takes more than one branch."""
        return self.guidance_scale != 1 or self.image_guidance_scale not in (None, 1)

    def settings(self) -> dict[str, Any]:
        """The options as JSON values, to be saved with an image."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "callback_on_step_end"}
        if not isinstance(self.sampler, str):
            values["sampler"] = type(self.sampler).__name__
        return {
            **values,
            "template_variables": dict(self.template_variables),
            "stop_strings": list(self.stop_strings),
            "guidance_interval": list(self.guidance_interval),
        }


def _options() -> dict[str, Option]:
    options = {}
    for item in fields(GenerationOptions):
        values = dict(item.metadata)
        if values["flag"] == "":
            values["flag"] = "--" + item.name.replace("_", "-")
        if values["request_name"] == "":
            values["request_name"] = item.name
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        options[item.name] = Option(name=item.name, kind=item.type, default=default, **values)
    return options


OPTIONS = _options()
"""All options by name, in the order of `GenerationOptions`."""
_CHECKED = [name for name in OPTIONS if name not in ("template_variables", "sampler", "callback_on_step_end")]
"""Options whose type `Option.check` can check; the others have checks of their own."""


def unknown_sampler(sampler: Any) -> str:
    """What is wrong with a sampler that is neither a known name nor a diffusers scheduler."""
    return f"sampler must be one of {', '.join(SAMPLERS)}, or a diffusers scheduler, got {short_repr(sampler)}"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for at most. A server lowers them."""

    max_new_tokens: int = 131_072
    max_images: int = 16
    max_num_steps: int = 1000
    max_image_size: int = 2048
    """Pixels per side of a generated image."""
    max_prompt_images: int = 64

    def check(self, options: GenerationOptions, num_prompt_images: int = 0) -> None:
        """Raise ValueError, naming value and limit, if `options` or the number of images in a prompt exceed them."""
        limits = {
            "max_new_tokens": (options.max_new_tokens, self.max_new_tokens),
            "max_images": (options.max_images, self.max_images),
            "num_steps": (options.num_steps, self.max_num_steps),
            "image_size": (options.image_size or 0, self.max_image_size),
            "the number of images in the prompt": (num_prompt_images, self.max_prompt_images),
        }
        for name, (value, limit) in limits.items():
            if value > limit:
                raise ValueError(f"{name} must be at most {limit} here, got {short_repr(value)}")
