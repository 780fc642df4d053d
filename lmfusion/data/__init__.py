"""Captioned images, interleaved documents, conversations and edits, and the rows made of them."""

from lmfusion.data.samples import (
    CaptionedImage,
    Conversation,
    DataConfig,
    Edit,
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
    "Edit",
    "Interleaved",
    "Latents",
    "Sample",
    "Source",
    "SourceConfig",
    "load_source",
]
