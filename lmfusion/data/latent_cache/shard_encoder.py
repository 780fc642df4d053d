"""Makes the tensors of one shard: reads and decodes its samples in threads, encodes images and tokenizes texts."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lmfusion.data.latent_cache.format import (
    CAPTIONED,
    CONVERSATION,
    DAMAGED,
    DTYPES,
    EDIT,
    IMAGE,
    INTERLEAVED,
    INVALID_TEXT,
    LATENT_NAMES,
    TARGET_IMAGE,
    TARGET_TEXT,
    TEXT,
    DamageRecord,
    checksum,
)
from lmfusion.data.pipeline.conversations import transcribe
from lmfusion.data.pipeline.skip_log import check_damaged_share
from lmfusion.data.samples import CaptionedImage, Conversation, Edit, LoadImage, Source, Transcript, parts_of
from lmfusion.data.storage.files import StorageError
from lmfusion.images.preprocessing import to_tensor
from lmfusion.model.batch import encode_captions
from lmfusion.model.codec import Codec
from lmfusion.utils.prefetch import map_threads
from lmfusion.utils.printing import escape_line


@dataclass(frozen=True)
class EncodeOptions:
    """Settings of a cache. Raises ValueError for a value out of range."""

    shard_samples: int = 2048
    """Samples of a shard. They are held in memory until it is written, in the end twice."""
    dtype: str = "float32"
    """Of the latents. float32 keeps every bit; the others take half the space."""
    keep_std: bool = False
    """Also keep the standard deviation of the autoencoder's posterior, which data.sample_latents needs."""
    num_workers: int = 4
    """Threads that read and decode images."""
    batch_size: int = 1
    """Images encoded at a time. With 1, latents are the same to the bit as in training from images. With more, a GPU is
    faster, and the last bits may differ."""
    max_damaged: float = 0.01
    """Share of samples that may be damaged before encoding stops."""

    def __post_init__(self) -> None:
        for name in ("shard_samples", "num_workers", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"the dtype of latents must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


class _Read(NamedTuple):
    """A sample after reading: its texts or token ids, its pixels, or why an image has none."""

    sample_id: str
    kind: int
    parts: list["str | list[int] | Tensor | _Failure"]
    is_target: list[bool]
    """Of each part: whether it belongs to an answer of the assistant in a conversation."""
    messages: list[dict[str, Any]]
    """Of a conversation until it is tokenized: its messages, of which `parts` are made."""


class _Failure(NamedTuple):
    reason: str


class ShardEncoder:
    """Makes the tensors of shards. The contents of a shard depend only on its number."""

    def __init__(
        self,
        source: Source,
        codec: Codec,
        tokenizer: Any,
        device: torch.device | str,
        options: EncodeOptions,
        is_for_vlm: bool = False,
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        self._source = source
        self._codec = codec
        self._tokenizer = tokenizer
        self._device = device
        self._options = options
        self._is_for_vlm = is_for_vlm
        self._template_variables = template_variables
        self._dtype: torch.dtype = getattr(torch, options.dtype)
        self._num_samples = 0
        self._num_damaged = 0

    def indices(self, number: int) -> range:
        """The indices of the samples of a shard."""
        begin = number * self._options.shard_samples
        return range(begin, min(begin + self._options.shard_samples, len(self._source)))

    def encode(
        self, number: int, report: Callable[[int], object]
    ) -> tuple[dict[str, Tensor], tuple[DamageRecord, ...]]:
        """The tensors of shard `number`, and the damaged samples and images in it.

        report: called with 1 after each sample. Raises ValueError where too many samples are damaged, StorageError
        where a file cannot be read.
        """
        indices = self.indices(number)
        latents = _LatentBuffer(self._codec, self._device, self._dtype, self._options)
        damaged: list[DamageRecord] = []
        texts: list[str | list[int]] = []
        parts: list[int] = []
        starts: list[tuple[int, int, int]] = [(0, 0, 0)]
        kinds, ids = [], []
        for index, read in zip(indices, map(self._transcribed, self._read_all(indices)), strict=True):
            num_before = latents.num_images
            for part, is_target in zip(read.parts, read.is_target, strict=True):
                if read.kind == DAMAGED and isinstance(part, _Failure):  # the only part
                    damaged.append(DamageRecord(index, None, part.reason))
                elif isinstance(part, _Failure):
                    damaged.append(DamageRecord(index, latents.num_images - num_before, part.reason))
                    latents.skip()
                    parts.append(TARGET_IMAGE if is_target else IMAGE)
                elif isinstance(part, Tensor):
                    latents.add(part, read.sample_id)
                    parts.append(TARGET_IMAGE if is_target else IMAGE)
                elif isinstance(part, list) or _is_unicode(part):
                    texts.append(part)
                    parts.append(TARGET_TEXT if is_target else TEXT)
                else:
                    parts.append(INVALID_TEXT)
            starts.append((len(parts), len(texts), latents.num_images))
            kinds.append(read.kind)
            ids.append(read.sample_id.encode("utf-8", "surrogatepass"))
            self._count(damaged, index)
            report(1)
        token_ids = self._tokenize(texts)
        first_part, first_text, first_image = np.array(starts, np.int64).T
        tables = {
            "token_ids": np.fromiter((i for of_text in token_ids for i in of_text), np.int32),
            "first_token": _starts(token_ids),
            "parts": np.array(parts, np.uint8),
            "first_part": first_part,
            "first_text": first_text,
            "first_image": first_image,
            "kinds": np.array(kinds, np.uint8),
            "sample_ids": np.frombuffer(bytearray(b"".join(ids)), np.uint8),
            "first_id_byte": _starts(ids),
        }
        return {
            **latents.tensors(),
            **{name: torch.from_numpy(np.ascontiguousarray(table)) for name, table in tables.items()},
        }, tuple(damaged)

    def _count(self, damaged: list[DamageRecord], index: int) -> None:
        self._num_samples += 1
        self._num_damaged += bool(damaged) and damaged[-1].index == index
        last = "; ".join(escape_line(f"sample {record.index}: {record.reason}") for record in damaged[-3:])
        check_damaged_share(self._num_damaged, self._num_samples, self._options.max_damaged, last)

    def _read_all(self, indices: range) -> Iterator[_Read]:
        """Samples in order, read ahead by threads."""
        num_threads = self._options.num_workers
        return map_threads(self._read, indices, num_threads, num_ahead=4 * num_threads, name="encode")

    def _read(self, index: int) -> _Read:
        try:
            sample = self._source[index]
        except StorageError:
            raise
        except (ValueError, OSError) as error:
            return _unreadable(error)
        assert not isinstance(sample, Transcript), "a source of texts gave tokens"
        if self._is_for_vlm and isinstance(sample, (Conversation, Edit)):
            raise ValueError(
                f"a latent cache for a vision-language model cannot hold {sample.sample_id}, a conversation or edit, "
                "whose input images keep their own size; train on the source itself"
            )
        if isinstance(sample, Conversation):
            messages = [{**m, "content": [self._part(part) for part in m["content"]]} for m in sample.messages]
            return _Read(sample.sample_id, CONVERSATION, [], [], messages)
        kind = EDIT if isinstance(sample, Edit) else CAPTIONED if isinstance(sample, CaptionedImage) else INTERLEAVED
        parts = parts_of(sample)
        return _Read(sample.sample_id, kind, [self._part(part) for part in parts], [False] * len(parts), [])

    def _transcribed(self, read: _Read) -> _Read:
        """`read` itself, or a conversation in tokens. Not for reading threads, which would share the tokenizer."""
        if read.kind != CONVERSATION:
            return read
        try:
            utterances = transcribe(
                self._tokenizer,
                read.messages,  # type: ignore[arg-type]
                template_variables=self._template_variables,
            )
        except ValueError as error:
            return _unreadable(error)
        parts = [what.tolist() if isinstance(what, np.ndarray) else what for what, _ in utterances]
        return read._replace(parts=parts, is_target=[is_target for _, is_target in utterances])

    def _part(self, part: Any) -> "str | Tensor | _Failure":
        return self._load(part) if callable(part) else str(part)

    def _load(self, load_image: LoadImage) -> Tensor | _Failure:
        config = self._codec.config
        try:
            image = load_image()
            assert isinstance(image, Image.Image), "a source of images gave latents"
            return to_tensor(image, config.image_size, config.channels)
        except StorageError:
            raise
        except (ValueError, OSError) as error:
            return _Failure(str(error))

    def _tokenize(self, texts: list[str | list[int]]) -> list[list[int]]:
        distinct = list(dict.fromkeys(text for text in texts if isinstance(text, str)))
        ids = dict(zip(distinct, encode_captions(self._tokenizer, distinct), strict=True))
        return [ids[text] if isinstance(text, str) else text for text in texts]


class _LatentBuffer:
    """The latents of a shard, encoded as images arrive, `batch_size` at a time."""

    def __init__(self, codec: Codec, device: torch.device | str, dtype: torch.dtype, options: EncodeOptions) -> None:
        self._codec = codec
        self._device = device
        self._dtype = dtype
        self._options = options
        self._names = LATENT_NAMES[: 1 + options.keep_std]
        self._latents: list[list[Tensor]] = []  # of each image the mean, and the deviation if it is kept
        self._waiting: list[tuple[int, str, Tensor]] = []

    @property
    def num_images(self) -> int:
        return len(self._latents)

    def skip(self) -> None:
        """Add zeros in place of an image that cannot be read."""
        shape = (self._codec.latent_channels, self._codec.latent_size, self._codec.latent_size)
        self._latents.append([torch.zeros(shape, dtype=self._dtype) for _ in self._names])

    def add(self, pixels: Tensor, sample_id: str) -> None:
        """pixels: [channels, H, W]. Raises ValueError where latents, also of an earlier image, are not finite."""
        self._waiting.append((self.num_images, sample_id, pixels))
        self._latents.append([])
        if len(self._waiting) == self._options.batch_size:
            self._encode()

    def tensors(self) -> dict[str, Tensor]:
        """mean, std if it is kept, and checksums of all images."""
        self._encode()
        shape = (0, self._codec.latent_channels, self._codec.latent_size, self._codec.latent_size)
        empty = [torch.empty(shape, dtype=self._dtype) for _ in self._names]
        columns = [torch.stack(column) for column in zip(*self._latents, strict=True)] or empty
        checksums = torch.tensor([checksum(latents) for latents in self._latents], dtype=torch.int64)
        return dict(zip(self._names, columns, strict=True)) | {"checksums": checksums}

    def _encode(self) -> None:
        if not self._waiting:
            return
        images = torch.stack([pixels for _, _, pixels in self._waiting]).to(self._device)
        moments = self._codec.moments(images)[: len(self._names)]
        stored = [x.to(self._dtype).cpu() for x in moments if x is not None]
        for i, (place, sample_id, _) in enumerate(self._waiting):
            self._latents[place] = [x[i].clone() for x in stored]
            if not all(x.isfinite().all() for x in self._latents[place]):
                raise ValueError(
                    f"the latents of sample {sample_id} must be finite as {self._options.dtype}; keep them as float32, "
                    "or look at the image and the autoencoder"
                )
        self._waiting.clear()


def _unreadable(error: Exception) -> _Read:
    return _Read("", DAMAGED, [_Failure(str(error))], [False], [])


def _starts(items: list[list[int]] | list[bytes]) -> np.ndarray:
    """int64 [N + 1]: where each item begins when all are concatenated."""
    return np.concatenate([[0], np.cumsum([len(item) for item in items], dtype=np.int64)]).astype(np.int64)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
