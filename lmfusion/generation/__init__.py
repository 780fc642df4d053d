"""Generation: answers of text and images, one event after the other, many requests at a time.

Names are loaded when they are first used, so that the command line can read the table of options at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmfusion.generation.api import Answer, caption_images, draw_images, generate_answers, stream_answer
    from lmfusion.generation.engine import Engine
    from lmfusion.generation.events import Done, Event, ImageBegin, ImageEnd, ImagePreview, TextDelta
    from lmfusion.generation.options import GenerationOptions, Limits
    from lmfusion.generation.prompt import Prompt, PromptLike, encode_prompt

_MODULES = {
    "api": ("Answer", "caption_images", "draw_images", "generate_answers", "stream_answer"),
    "engine": ("Engine",),
    "events": ("Done", "Event", "ImageBegin", "ImageEnd", "ImagePreview", "TextDelta"),
    "options": ("GenerationOptions", "Limits"),
    "prompt": ("Prompt", "PromptLike", "encode_prompt"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Answer",
    "Done",
    "Engine",
    "Event",
    "GenerationOptions",
    "ImageBegin",
    "ImageEnd",
    "ImagePreview",
    "Limits",
    "Prompt",
    "PromptLike",
    "TextDelta",
    "caption_images",
    "draw_images",
    "encode_prompt",
    "generate_answers",
    "stream_answer",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
