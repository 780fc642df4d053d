"""Captioned images and interleaved documents, and the rows made of them."""

from lmfusion.data.sources import (
    CaptionedImage,
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
    "DataConfig",
    "Interleaved",
    "Latents",
    "Sample",
    "Source",
    "SourceConfig",
    "load_source",
]
