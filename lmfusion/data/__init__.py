"""Captioned images, interleaved documents, conversations and edits, and the packed sequences made of them."""

from lmfusion.data.config import DataConfig, SourceConfig
from lmfusion.data.registry import load_source
from lmfusion.data.samples import CaptionedImage, Conversation, Edit, Interleaved, Latents, LatentSource, Sample, Source

__all__ = [
    "CaptionedImage",
    "Conversation",
    "DataConfig",
    "Edit",
    "Interleaved",
    "LatentSource",
    "Latents",
    "Sample",
    "Source",
    "SourceConfig",
    "load_source",
]
