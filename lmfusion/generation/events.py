"""Events: the five kinds of updates about an answer, in the order in which they happen.

TextDelta* (ImageBegin ImagePreview* ImageEnd TextDelta*)* Done
"""

from dataclasses import dataclass, field
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class TextDelta:
    """More text of the answer."""

    text: str
    """Never empty, never half a character; text that may still become a stop string is held back."""


@dataclass(frozen=True)
class ImageBegin:
    """The answer continues with an image, which is denoised from now on."""

    index: int
    """0 for the first image of the answer."""
    width: int
    height: int
    num_steps: int


@dataclass(frozen=True)
class ImagePreview:
    """A rough picture of the clean image that the last step predicted."""

    index: int
    step: int
    """Denoising steps done, 1 to num_steps."""
    num_steps: int
    image: Image.Image
    """As large as the finished image; its colours are those of `lmfusion.generation.previews`."""


@dataclass(frozen=True)
class ImageEnd:
    """An image is finished."""

    index: int
    image: Image.Image
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings it was made with, as JSON values: prompt, seed, sampler, num_steps, guidance_scale, ..."""


@dataclass(frozen=True)
class Done:
    """The answer has ended; nothing follows."""

    finish_reason: str
    """"stop" (the end-of-text token or a stop string), "length" (max_new_tokens, or the context is full),
    "cancelled", or "error" (see `error`)."""
    num_prompt_tokens: int
    """Tokens of the prompt, including those of its images."""
    num_new_tokens: int
    """Text tokens of the answer."""
    num_images: int
    seconds: float
    """From the first forward of the request to its end, without the time in the queue."""
    error: str = ""
    """Why the request failed, with finish_reason "error"."""
    exception: Exception | None = field(default=None, repr=False, compare=False)
    """The exception that ended it."""


Event = TextDelta | ImageBegin | ImagePreview | ImageEnd | Done
