"""What can a trained model make? Answers of text and images, one event after the other, many at a time."""

from lmfusion.generation.api import Answer, caption_images, draw_images, generate_answers, stream_answer
from lmfusion.generation.engine import Engine
from lmfusion.generation.events import Done, Event, ImageBegin, ImageEnd, ImagePreview, TextDelta
from lmfusion.generation.options import GenerationOptions, Limits
from lmfusion.generation.prompt import Prompt, PromptLike, encode_prompt

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
