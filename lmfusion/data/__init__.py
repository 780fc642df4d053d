"""Captioned images, and the batches made of them."""

from lmfusion.data.sources import DataConfig, Sample, Source, load_source

__all__ = ["DataConfig", "Sample", "Source", "load_source"]
