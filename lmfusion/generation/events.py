"""What happens while an answer is being made? Five kinds of event, in the order in which they happen.

TextDelta* (ImageBegin ImagePreview* ImageEnd TextDelta*)* Done
"""

from dataclasses import dataclass, field
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class TextDelta:
    """The answer's text goes on."""

    text: str
    """Never empty, never half a character; what might still become a stop string is held back."""


@dataclass(frozen=True)
class ImageBegin:
    """The answer goes on with an image, which is drawn from now on."""

    index: int
    """0 for the first image of the answer."""
    width: int
    height: int
    num_steps: int


@dataclass(frozen=True)
class ImagePreview:
    """What the image would be if it were finished now: the predicted clean image, roughly."""

    index: int
    step: int
    """Denoising steps done, 1 to num_steps."""
    num_steps: int
    image: Image.Image
    """Of the size of the finished image, with the colours of `lmfusion.generation.previews`."""


@dataclass(frozen=True)
class ImageEnd:
    """An image is finished."""

    index: int
    image: Image.Image
    settings: dict[str, Any] = field(default_factory=dict)
    """What it was made with, in values JSON knows: prompt, seed, sampler, num_steps, guidance_scale, ..."""


@dataclass(frozen=True)
class Done:
    """The answer is finished; nothing follows."""

    finish_reason: str
    """"stop" (the end-of-text token or a stop string), "length" (max_new_tokens, or the context is full),
    "cancelled", or "error" (see `error`)."""
    num_prompt_tokens: int
    """Rows that the prompt took, those of its images included."""
    num_new_tokens: int
    """Text tokens of the answer."""
    num_images: int
    seconds: float
    """From the first forward of the request to its end; waiting in a queue is not counted."""
    error: str = ""
    """Why the request failed, with finish_reason "error"."""
    exception: Exception | None = field(default=None, repr=False, compare=False)
    """What was raised then."""


Event = TextDelta | ImageBegin | ImagePreview | ImageEnd | Done
