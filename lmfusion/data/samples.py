"""The samples that sources give (captioned images, documents, conversations, edits) and the protocols of sources."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np
from PIL import Image
from torch import Tensor

Text = str | np.ndarray
"""A text, or its token ids without bos and eos (int32 [n]) where it comes from a latent cache."""


class Latents(NamedTuple):
    """The latents of one image: the mean of the codec's posterior and, where it was kept, its standard deviation."""

    mean: Tensor
    """float32 [C, h, w]"""
    std: Tensor | None
    """like mean"""


LoadImage = Callable[[], Image.Image | Latents]
"""Decodes one image, in any mode and size, or reads its latents.

Raises ValueError or OSError where the image is damaged or missing, so that its sample is skipped. Raises StorageError
(an OSError) where storage fails: the image itself may be good, so the run must stop."""


class CaptionedImage(NamedTuple):
    """An image and its captions."""

    sample_id: str
    """A name that is the same in every run; errors refer to the sample by it."""
    load_image: LoadImage
    captions: tuple[Text, ...]
    """One or more; each epoch picks one."""


class Interleaved(NamedTuple):
    """A document of texts and images in their order."""

    sample_id: str
    parts: tuple[Text | LoadImage, ...]


class Message(TypedDict):
    """A message of a conversation."""

    role: str
    """"system", "user" or "assistant"."""
    content: tuple[str | LoadImage, ...]


class Conversation(NamedTuple):
    """A conversation. Training learns the assistant's messages."""

    sample_id: str
    messages: tuple[Message, ...]


class Utterance(NamedTuple):
    """A run of tokens, or an image, of a conversation as the chat template writes it."""

    what: Any
    """Token ids (int32 [n]), or a LoadImage."""
    is_target: bool
    """Whether it belongs to an answer of the assistant. Only answers have a loss."""


class Transcript(NamedTuple):
    """A conversation in tokens, as a latent cache holds it."""

    sample_id: str
    utterances: tuple[Utterance, ...]


class Edit(NamedTuple):
    """An input image, an instruction that changes it, and the target image. Only the target image has a loss."""

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
    """A finite, indexable set of samples. Threads may read it at the same time.

    lmfusion.data.sources.base has mixins for `blocks` and `__len__`.
    """

    @property
    def blocks(self) -> Sequence[int]:
        """Sizes of runs of samples that are cheap to read together (a tar, a row group), in order. Their sum is the
        length; a source without such runs is one block."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Texts are read here, images when they are loaded. Raises ValueError or OSError, naming the sample, where only
        that sample is damaged, and StorageError (an OSError) where storage fails, which is not damage."""
        ...


@runtime_checkable
class LatentSource(Protocol):
    """A source of latents and token ids, which fit only the codec, tokenizer and template that made them."""

    def check_made_with(self, codec: Any, tokenizer: Any) -> None:
        """Raise ValueError, naming what differs, unless latents are this codec's and token ids this tokenizer's."""
        ...

    def check_template_variables(self, template_variables: Mapping[str, Any]) -> None:
        """Raise ValueError, naming what differs, where conversations were written with other template variables."""
        ...
