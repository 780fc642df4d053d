"""Captioned images, interleaved documents and conversations, and the rows made of them."""

from lmfusion.data.sources import (
    CaptionedImage,
    Conversation,
    DataConfig,
    Interleaved,
    Latents,
    Sample,
    Source,
    SourceConfig,
    load_source,
)

__all__ = [
    "CaptionedImage",
    "Conversation",
    "DataConfig",
    "Interleaved",
    "Latents",
    "Sample",
    "Source",
    "SourceConfig",
    "load_source",
]
