"""How does a latent cache lie on the disk, and how are its samples read? A manifest and memory-mapped shards.

<cache>/
    manifest.json              what the cache was made of and with, and the size and sha256 of every shard; written last
    shard-00000000.safetensors `shard_samples` samples each, in the order of the source they were made of

Tensors of a shard, for S samples with I images, T texts and P parts (an image with its captions is one image part and
one text part each caption; an interleaved document and an edit have their parts in their order; a conversation those
that the chat template makes of it):

    mean, std         [I, C, h, w] of the latents, in the cache's dtype; std only where it was asked for
    checksums         int64 [I]: CRC-32 of the bytes of each image's mean (and std)
    token_ids         int32: ids of all texts, one after another, without bos and eos, not cut
    first_token       int64 [T + 1]: where each text begins in token_ids
    parts             uint8 [P]: TEXT, IMAGE, REFUSED for a text that no tokenizer can read; SAID_TEXT and SAID_IMAGE
                      for what the assistant says in a conversation
    first_part, first_text, first_image   int64 [S + 1]: where each sample begins among them
    kinds             uint8 [S]: CAPTIONED, INTERLEAVED, CONVERSATION, EDIT, or DAMAGED for one that could not be read
    sample_ids        uint8: all ids in UTF-8, one after another; first_id_byte   int64 [S + 1]: where each begins

All but mean and std are the shard's tables. They are compared with their sha256 in the manifest when a shard is opened,
latents with their checksum whenever they are read: nothing that has changed on the disk is trained on.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmfusion.data.samples import (
    CONVERSING,
    CaptionedImage,
    Edit,
    Interleaved,
    Latents,
    LoadImage,
    Sample,
    Text,
    Transcript,
    Utterance,
)
from lmfusion.data.storage.files import StorageError, retry
from lmfusion.images.preprocessing import to_tensor
from lmfusion.model.codec import Codec
from lmfusion.text.chat_template import TODAY
from lmfusion.utils.config_values import short_repr
from lmfusion.utils.hashing import values_sha256

FORMAT = 1
MANIFEST = "manifest.json"
VARIABLES = "template_variables"
"""What conversations were written with, in the plan of a cache that has some."""
LATENTS = ("mean", "std")
TEXT, IMAGE, REFUSED, SAID_TEXT, SAID_IMAGE = range(5)
CAPTIONED, INTERLEAVED, DAMAGED, CONVERSATION, EDIT = range(5)
DTYPES = ("float32", "float16", "bfloat16")
MAX_OPEN_SHARDS = 16384
"""Kept mapped at a time; systems usually allow a process 65,530 mappings."""


@dataclass(frozen=True)
class DamageRecord:
    """What could not be read when the cache was made."""

    index: int
    """Of the sample in the source."""
    image: int | None
    """Which image of the sample; None: the sample as a whole."""
    reason: str


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest knows of one shard."""

    size: int
    """Bytes."""
    sha256: str
    tables_sha256: str
    num_images: int
    num_tokens: int
    damaged: tuple[DamageRecord, ...]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "ShardRecord":
        """Raises KeyError or TypeError for values that are no record."""
        damaged = tuple(DamageRecord(**record) for record in values["damaged"])
        return cls(**{**values, "damaged": damaged})


class LatentShards:
    """The source `latents`: the latent cache in the folder `path`, as `lmfusion encode` wrote it.

    Its samples have the ids, order and blocks of the source it was made of, captions as token ids, and images as
    `Latents` in float32. A sample that was damaged then raises the same ValueError now.

    Raises ValueError, naming the file, for a cache that is unfinished, of another format, or damaged, and for shards
    that are missing or have another size. Threads may read it at the same time.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        self.manifest = read_manifest(self.folder)
        try:
            self.plan: dict[str, Any] = self.manifest["plan"]
            self._shard_samples = int(self.plan["shard_samples"])
            self._num_samples = int(self.plan["num_samples"])
            self.blocks = tuple(size for size, count in self.plan["blocks"] for _ in range(count))
            self.has_std = bool(self.plan["has_std"])
            self.shards = tuple(ShardRecord.of(values) for values in self.manifest["shards"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(self.folder / MANIFEST, f"{error!r}") from error
        self._damage = {
            (record.index, record.image): record.reason for shard in self.shards for record in shard.damaged
        }
        for number, shard in enumerate(self.shards):
            file = self.folder / shard_name(number)
            if not file.is_file():
                raise _damaged(file, "it is missing")
            if file.stat().st_size != shard.size:
                raise _damaged(file, f"it has {file.stat().st_size} bytes, not {shard.size}")
        self._open_shard = lru_cache(MAX_OPEN_SHARDS)(self._map_shard)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} is outside a cache of {self._num_samples}")
        number, i = divmod(index, self._shard_samples)
        tables = self._open_shard(number)
        if (reason := self._damage.get((index, None))) is not None:
            raise ValueError(reason)
        begin, end = _span(tables["first_id_byte"], i)
        sample_id = tables["sample_ids"][begin:end].numpy().tobytes().decode("utf-8", "surrogatepass")
        text, image = int(tables["first_text"][i]), int(tables["first_image"][i])
        first_image = image
        parts: list[Text | LoadImage] = []
        kinds = tables["parts"][slice(*_span(tables["first_part"], i))].tolist()
        for part in kinds:
            if part in (IMAGE, SAID_IMAGE):
                parts.append(partial(self._load, index, image - first_image, number, image))
                image += 1
            elif part == REFUSED:
                parts.append("\ud800")  # half a surrogate pair: refused where it is chosen, as what it stands for was
            else:
                parts.append(tables["token_ids"][slice(*_span(tables["first_token"], text))].numpy().copy())
                text += 1
        if int(tables["kinds"][i]) == INTERLEAVED:
            return Interleaved(sample_id, tuple(parts))
        if int(tables["kinds"][i]) == CONVERSATION:
            is_target = (part in (SAID_TEXT, SAID_IMAGE) for part in kinds)
            return Transcript(sample_id, tuple(map(Utterance, parts, is_target)))
        if int(tables["kinds"][i]) == EDIT:
            return Edit(sample_id, *parts)  # type: ignore[arg-type]
        load_image, *captions = parts
        return CaptionedImage(sample_id, load_image, tuple(captions))  # type: ignore[arg-type]

    def check_made_with(self, codec: Codec, tokenizer: Any) -> None:
        """Raise ValueError, naming what differs, unless this codec and tokenizer would give the same cache."""
        check_same(self.folder, made_with(codec, tokenizer), self.plan, "make another cache with `lmfusion encode`")

    def check_template_variables(self, template_variables: Mapping[str, Any]) -> None:
        """Raise ValueError, naming what differs, where conversations were written with other template variables. The
        date is that of the cache."""
        if self.plan["source"]["kind"] in CONVERSING:
            now, was = (
                {name: value for name, value in values.items() if name != TODAY}
                for values in (template_variables, self.plan.get(VARIABLES, {}))
            )
            if now != was:
                raise ValueError(
                    f"the latent cache {self.folder} was made with the template variables {was}, and the model has "
                    f"{now}; set model.template_variables, or make another cache with `lmfusion encode`"
                )

    def _load(self, index: int, which: int, number: int, image: int) -> Latents:
        """The latents of one image: number `which` of sample `index`, at `image` in shard `number`."""
        if (reason := self._damage.get((index, which))) is not None:
            raise ValueError(reason)
        tensors = self._open_shard(number)
        stored = [tensors[name][image] for name in LATENTS[: 1 + self.has_std]]
        if checksum(stored) != int(tensors["checksums"][image]):
            file = self.folder / shard_name(number)
            raise _damaged(file, f"the latents of sample {index} are not what was written")
        mean, *std = (tensor.to(torch.float32, copy=True) for tensor in stored)
        return Latents(mean, std[0] if std else None)

    def _map_shard(self, number: int) -> dict[str, Tensor]:
        """Tensors of a shard by name, lying on the mapped file. Raises ValueError where they are not as written."""
        file, record = self.folder / shard_name(number), self.shards[number]
        try:
            with retry(lambda: safe_open(file, framework="pt"), str(file)) as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            digest = tables_sha256(tensors)
        except StorageError:
            raise
        except (SafetensorError, OSError, RuntimeError, TypeError, UnicodeDecodeError) as error:
            raise _damaged(file, str(error)) from error
        dtype, shape = getattr(torch, self.plan["dtype"]), (record.num_images, *self.plan["latent_shape"])
        for name in LATENTS[: 1 + self.has_std]:
            latents = tensors.get(name)
            if latents is None or latents.dtype != dtype or tuple(latents.shape) != shape:
                raise _damaged(file, f"its tensor {name!r} is not {self.plan['dtype']} {list(shape)}")
        if digest != record.tables_sha256:
            raise _damaged(file, "its tables are not what was written")
        return tensors


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the cache in `folder`, after comparing its own digest. Raises ValueError where it is no such."""
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(
            f"{folder} is no finished latent cache: it holds no {MANIFEST}; run `lmfusion encode` (again: it continues)"
        )
    try:
        values = json.loads(file.read_bytes())
        version, digest = values.pop("format"), values.pop("sha256")
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(file, f"{error!r}") from error
    if version != FORMAT:
        raise ValueError(f"{file} has format {version!r}; this version of lmfusion reads {FORMAT}: encode again")
    if digest != values_sha256(values):
        raise _damaged(file, "its contents do not have the sha256 it tells")
    return values


def made_with(codec: Codec, tokenizer: Any) -> dict[str, Any]:
    """What the contents of a cache depend on besides its source, as plain values."""
    return {
        "codec": codec.identity(),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "preprocessing_sha256": preprocessing_sha256(codec),
    }


def check_same(folder: Path, expected: Mapping[str, Any], found: Mapping[str, Any], way_out: str) -> None:
    """Raise ValueError, naming keys and values, unless `found` in a cache holds what is `expected` of it."""
    was, now = _flatten(found), _flatten(expected)
    differing = [
        f"{key} was {short_repr(was.get(key))}, is {short_repr(value)}"
        for key, value in now.items()
        if was.get(key) != value
    ]
    if differing:
        raise ValueError(f"the latent cache {folder} was made otherwise: {', '.join(differing)}; {way_out}")


def tokenizer_sha256(tokenizer: Any) -> str:
    """Digest of what the token ids of a text depend on, whatever the tokenizer was asked before."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return values_sha256({"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()})
    values = json.loads(backend.to_str())
    for state in ("truncation", "padding"):  # of the last call
        values.pop(state, None)
    return values_sha256(values)


def preprocessing_sha256(codec: Codec) -> str:
    """Digest of the pixels that a fixed pattern becomes: it changes where cropping, resizing or scaling do."""
    height, width = 61, 97
    ramp = np.arange(height * width * 3, dtype=np.int64) * 2654435761 >> 13
    pattern = (ramp % 251).astype(np.uint8).reshape(height, width, 3)
    pixels = to_tensor(pattern, codec.config.image_size, codec.config.channels)
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()


def tables_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, types and contents of all tensors of a shard but the latents."""
    digest = hashlib.sha256()
    for name in sorted(tensors.keys() - set(LATENTS)):
        table = tensors[name].contiguous()
        digest.update(f"{name} {table.dtype} {list(table.shape)};".encode())
        digest.update(table.numpy().data)
    return digest.hexdigest()


def checksum(latents: list[Tensor]) -> int:
    """CRC-32 of the bytes of one image's latents."""
    value = 0
    for tensor in latents:
        value = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, value)
    return value


def shard_name(number: int) -> str:
    return f"shard-{number:08d}.safetensors"


def _span(first: Tensor, i: int) -> tuple[int, int]:
    begin, end = first[i : i + 2].tolist()
    return begin, end


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _damaged(file: Path, what: str) -> ValueError:
    return ValueError(f"{file} is damaged: {what}; copy it again, or delete the cache and run `lmfusion encode` again")
