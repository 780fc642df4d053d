"""What may be asked of an answer? Settings of text and images, in transformers' and diffusers' words, and limits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from lmfusion.generation.samplers import SAMPLERS
from lmfusion.text.chat_template import check_template_variables

MAX_STOP_STRINGS = 16
MAX_GUIDANCE = 1000
MIN_TOP_P, MAX_TOP_K = 1e-6, 10**6
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3
StepCallback = Callable[[int, int, dict[str, Tensor]], Mapping[str, Tensor] | None]
"""(step, timestep, {"latents": [C, h, w]}) -> None, or {"latents": ...} to go on from instead."""

_KINDS: tuple[tuple[str, Any, str], ...] = (
    ("do_sample", bool | None, "True, False or None"),
    ("temperature", int | float, "a number"),
    ("top_p", int | float, "a number"),
    ("draw_first", bool, "True or False"),
    ("guidance_scale", int | float, "a number"),
    ("image_guidance_scale", int | float | None, "a number or None"),
    ("guidance_interval", tuple | list, "(low, high)"),
    ("guidance_rescale", int | float, "a number"),
    ("negative_prompt", str | None, "a text or None"),
)
"""What is no whole number: its types, and how they are said."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Settings of one answer. Raises ValueError for a number out of range or an unknown sampler."""

    max_new_tokens: int = 256
    """Text tokens of the answer at most; images are counted by `max_images`."""
    do_sample: bool | None = None
    """True: draw tokens by chance, at temperature 1 where none is given; False: take the likeliest. None: by
    temperature."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Draw among this many of the likeliest tokens; 0: among all."""
    stop_strings: Sequence[str] = ()
    """Text that ends the answer; it is not part of it. A control token's name, such as "<|im_end|>", is that token."""
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that the chat template of a conversation reads by name, such as {"enable_thinking": False}, over
    those saved with the model. `today` (YYYY-MM-DD) is the date it is told."""
    seed: int = 0
    """The same seed gives the same answer, alone or in a batch, on the same device and versions."""

    max_images: int = 0
    """Images of the answer at most. With 0 the image side is silent: every word is the base LLM's."""
    min_images: int = 0
    """Where the text would end before as many images have been drawn, one is drawn then and there."""
    draw_first: bool = False
    """Begin with an image instead of text."""
    num_steps: int = 50
    """Denoising steps of an image."""
    sampler: Any = "ddpm"
    """"ddpm", "ddim", "dpm-solver" (DPM-Solver++ 2M, which needs the fewest steps), or any diffusers scheduler."""
    guidance_scale: float = 1.55
    """How far to go from the prediction without the text to the one with it, and beyond; 1: no guidance."""
    image_guidance_scale: float | None = None
    """How far to go from the prediction without anything to the one with the images that came before, for edits
    (InstructPix2Pix, equation 3). None: images before are dropped together with the text."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guide only between these shares of the noise levels, 1 being pure noise; steps outside cost one branch."""
    guidance_rescale: float = 0.0
    """How much of the guided prediction's contrast to take back (Lin et al. 2023, section 3.4), 0 to 1."""
    negative_prompt: str | None = None
    """Text that takes the place of no text in guidance."""
    image_size: int | None = None
    """Pixels a side; None: the size the model was trained with."""
    preview_every: int = 0
    """Steps from one preview to the next; 0: none."""
    callback_on_step_end: StepCallback | None = None
    """Called after every denoising step of every image; it may replace the latents."""

    def __post_init__(self) -> None:
        whole = {"max_new_tokens": 0, "top_k": 0, "seed": 0, "max_images": 0, "min_images": 0, "num_steps": 1}
        whole |= {"preview_every": 0} if self.image_size is None else {"preview_every": 0, "image_size": 1}
        for name, least in whole.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; it is a whole number, {least} or more")
        for name, kind, expected in _KINDS:
            value = getattr(self, name)
            if not isinstance(value, kind) or (isinstance(value, bool) and "True" not in expected):
                raise ValueError(f"{name} is {value!r:.80}; it is {expected}")
        check_template_variables(self.template_variables)
        self._check_text()
        self._check_images()

    def _check_text(self) -> None:
        if not (self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE):
            raise ValueError(
                f"temperature is {self.temperature}; it is 0 (greedy), or {MIN_TEMPERATURE} to {MAX_TEMPERATURE}"
            )
        if self.do_sample is False and self.temperature > 0:
            raise ValueError(f"do_sample is False, but temperature is {self.temperature}; leave one of them out")
        if not MIN_TOP_P <= self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it is {MIN_TOP_P} to 1")
        if self.top_k > MAX_TOP_K:
            raise ValueError(f"top_k is above {MAX_TOP_K}, the limit; 0 is among all tokens")
        if not isinstance(self.stop_strings, (list, tuple)) or len(self.stop_strings) > MAX_STOP_STRINGS:
            raise ValueError(f"stop_strings is {self.stop_strings!r}; give a list of at most {MAX_STOP_STRINGS} texts")
        if not all(isinstance(stop, str) and stop for stop in self.stop_strings):
            raise ValueError(f"stop_strings is {self.stop_strings!r}; each is a text, and none is empty")

    def _check_images(self) -> None:
        if self.min_images > self.max_images:
            raise ValueError(f"min_images is {self.min_images}, but max_images {self.max_images}; raise max_images")
        if self.draw_first and not self.max_images:
            raise ValueError("draw_first begins with an image, but max_images is 0; raise it")
        if self.max_images == 0 and self.max_new_tokens == 0:
            raise ValueError("max_new_tokens and max_images are both 0; that leaves nothing to generate")
        if self.max_new_tokens == 0 and not (self.draw_first or self.min_images):
            raise ValueError("max_new_tokens is 0, so nothing begins an image; set draw_first or min_images")
        if self.callback_on_step_end is not None and not callable(self.callback_on_step_end):
            raise ValueError(f"callback_on_step_end is {self.callback_on_step_end!r:.80}; it is a function")
        if isinstance(self.sampler, str) and self.sampler not in SAMPLERS:
            raise ValueError(
                f"unknown sampler {self.sampler!r}; known: {', '.join(SAMPLERS)}, or a diffusers scheduler"
            )
        for name in ("guidance_scale", "image_guidance_scale"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_GUIDANCE:
                raise ValueError(f"{name} is {value}; it is 0 to {MAX_GUIDANCE} (1: no guidance)")
        interval = self.guidance_interval
        is_pair = len(interval) == 2 and all(isinstance(end, int | float) for end in interval)
        if not (is_pair and 0 <= interval[0] <= interval[1] <= 1):
            raise ValueError(
                f"guidance_interval is {self.guidance_interval}; it is (low, high) with 0 <= low <= high <= 1"
            )
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale is {self.guidance_rescale}; it is between 0 and 1")

    @property
    def text_temperature(self) -> float:
        """The temperature in force: `temperature`, or 1 where sampling is asked for without one."""
        return 1.0 if self.do_sample and self.temperature == 0 else self.temperature

    @property
    def is_guided(self) -> bool:
        """Whether an image takes more than one branch."""
        return self.guidance_scale != 1 or self.image_guidance_scale not in (None, 1)

    def settings(self) -> dict[str, Any]:
        """What an image was made with, in values JSON knows."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "callback_on_step_end"}
        if not isinstance(self.sampler, str):
            values["sampler"] = type(self.sampler).__name__
        return {
            **values,
            "template_variables": dict(self.template_variables),
            "stop_strings": list(self.stop_strings),
            "guidance_interval": list(self.guidance_interval),
        }


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for at most, whoever it comes from; a server lowers them."""

    max_new_tokens: int = 131_072
    max_images: int = 16
    max_num_steps: int = 1000
    max_image_size: int = 2048
    """Pixels a side of a drawn image."""
    max_prompt_images: int = 64

    def check(self, options: GenerationOptions, num_prompt_images: int = 0) -> None:
        """Raise ValueError, naming value and limit, where `options` or a prompt's images go beyond."""
        asked = {
            "max_new_tokens": (options.max_new_tokens, self.max_new_tokens),
            "max_images": (options.max_images, self.max_images),
            "num_steps": (options.num_steps, self.max_num_steps),
            "image_size": (options.image_size or 0, self.max_image_size),
            "the number of images in the prompt": (num_prompt_images, self.max_prompt_images),
        }
        for name, (value, limit) in asked.items():
            if value > limit:
                raise ValueError(f"{name} is {value}; the limit here is {limit}")
