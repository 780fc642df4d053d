"""The source classes by kind, and `load_source`, which makes the source that a configuration names."""

import importlib

from lmfusion.data.config import PACKAGED_KINDS, SourceConfig
from lmfusion.data.samples import Source

SOURCES = {
    "digits": "lmfusion.synthetic.digits:Digits",
    "digit_conversations": "lmfusion.synthetic.digits:DigitConversations",
    "openmoji": "lmfusion.synthetic.openmoji:OpenMoji",
    "shapes": "lmfusion.synthetic.shapes:Shapes",
    "shape_edits": "lmfusion.synthetic.shapes:ShapeEdits",
    "folder": "lmfusion.data.sources.folder:ImageFolder",
    "webdataset": "lmfusion.data.sources.webdataset:WebDataset",
    "parquet": "lmfusion.data.sources.parquet:ParquetFiles",
    "interleaved": "lmfusion.data.sources.interleaved:InterleavedFiles",
    "latents": "lmfusion.data.latent_cache.reader:LatentShards",
}
"""Kind -> "module:class". A source's module is imported when it is used: it may need an optional package."""
RENDERED_KINDS = ("openmoji", "shapes", "shape_edits")
"""Kinds whose images are rendered at any size. Their classes take the size as their first argument."""


def load_source(config: SourceConfig, image_size: int) -> Source:
    """The source that `config` names. image_size: height and width in pixels of images that are rendered.

    Raises ValueError where a package is missing, or where there is nothing at the path.
    """
    module, _, name = SOURCES[config.kind].partition(":")
    source_class = getattr(importlib.import_module(module), name)
    source: Source
    if config.kind in RENDERED_KINDS:
        source = source_class(image_size, config.split)
    elif config.kind in PACKAGED_KINDS:
        source = source_class(config.split)
    elif config.kind in ("webdataset", "parquet"):
        source = source_class(config.path, image=config.image, caption=config.caption)
    else:
        source = source_class(config.path)
    return source
