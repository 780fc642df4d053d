"""The format of a latent cache on the disk: a manifest, and shards that can be mapped into memory.

<cache>/
    manifest.json              what the cache was made of and with, and the size and sha256 of every shard; written last
    shard-00000000.safetensors `shard_samples` samples each, in the order of the source

Tensors of a shard, for S samples with I images, T texts and P parts. A captioned image is one image part and one text
part for each caption; an interleaved document and an edit have their parts in their order; a conversation has the parts
that the chat template makes of it.

    mean, std         [I, C, h, w] of the latents, in the cache's dtype; std only with keep_std
    checksums         int64 [I]: CRC-32 of the bytes of each image's mean (and std)
    token_ids         int32: ids of all texts, one after another, without bos and eos, not cut
    first_token       int64 [T + 1]: where each text begins in token_ids
    parts             uint8 [P]: TEXT, IMAGE, or INVALID_TEXT for a text that no tokenizer can read; TARGET_TEXT and
                      TARGET_IMAGE for the assistant's part of a conversation
    first_part, first_text, first_image   int64 [S + 1]: where each sample begins among them
    kinds             uint8 [S]: CAPTIONED, INTERLEAVED, CONVERSATION, EDIT, or DAMAGED for one that could not be read
    sample_ids        uint8: all ids in UTF-8, one after another; first_id_byte   int64 [S + 1]: where each begins

All tensors except mean and std are the shard's tables. They are compared with their sha256 in the manifest when a shard
is opened, and latents with their checksum whenever they are read: nothing that has changed on the disk is trained on.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmfusion.images.preprocessing import to_tensor
from lmfusion.model.codec import Codec
from lmfusion.utils.config_values import short_repr
from lmfusion.utils.hashing import values_sha256

FORMAT = 1
MANIFEST = "manifest.json"
TEMPLATE_VARIABLES = "template_variables"
"""Key, in the plan of a cache with conversations, of the variables that their chat template was given."""
LATENT_NAMES = ("mean", "std")
TEXT, IMAGE, INVALID_TEXT, TARGET_TEXT, TARGET_IMAGE = range(5)
CAPTIONED, INTERLEAVED, DAMAGED, CONVERSATION, EDIT = range(5)
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class DamageRecord:
    """A sample or an image that could not be read when the cache was made."""

    index: int
    """Of the sample in its source."""
    image: int | None
    """Number of the image in the sample; None: the sample as a whole."""
    reason: str


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest holds of one shard."""

    size: int
    """bytes"""
    sha256: str
    tables_sha256: str
    num_images: int
    num_tokens: int
    damaged: tuple[DamageRecord, ...]

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "ShardRecord":
        """Raises KeyError or TypeError for values that are not those of a record."""
        damaged = tuple(DamageRecord(**record) for record in values["damaged"])
        return cls(**{**values, "damaged": damaged})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the cache in `folder`. Raises ValueError where it is missing, damaged or of another format."""
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(
            f"{folder} must be a finished latent cache, but has no {MANIFEST}; run `lmfusion encode`, which continues "
            "an unfinished one"
        )
    try:
        values = json.loads(file.read_bytes())
        version, digest = values.pop("format"), values.pop("sha256")
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise damaged_error(file, f"{error!r}") from error
    if version != FORMAT:
        raise ValueError(f"the format of {file} must be {FORMAT}, got {version!r}; run `lmfusion encode` again")
    if digest != values_sha256(values):
        raise damaged_error(file, "its contents do not have the sha256 that it states")
    return values


def made_with(codec: Codec, tokenizer: Any) -> dict[str, Any]:
    """What the contents of a cache depend on besides its source, as values for JSON."""
    return {
        "codec": codec.identity(),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "preprocessing_sha256": preprocessing_sha256(codec),
    }


def check_same(folder: Path, expected: Mapping[str, Any], found: Mapping[str, Any], way_out: str) -> None:
    """Raise ValueError, naming keys and values, unless the plan `found` in a cache agrees with `expected`."""
    was, now = _flatten(found), _flatten(expected)
    differing = [
        f"{key} must be {short_repr(value)}, got {short_repr(was.get(key))}"
        for key, value in now.items()
        if was.get(key) != value
    ]
    if differing:
        raise ValueError(f"the latent cache {folder} was made differently: {', '.join(differing)}; {way_out}")


def tokenizer_sha256(tokenizer: Any) -> str:
    """Digest of everything that token ids depend on. Earlier calls of the tokenizer do not change it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return values_sha256({"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()})
    values = json.loads(backend.to_str())
    for state in ("truncation", "padding"):  # left by the last call
        values.pop(state, None)
    return values_sha256(values)


def preprocessing_sha256(codec: Codec) -> str:
    """Digest of the pixels made of a fixed pattern: it changes when cropping, resizing or scaling change."""
    height, width = 61, 97
    ramp = np.arange(height * width * 3, dtype=np.int64) * 2654435761 >> 13
    pattern = (ramp % 251).astype(np.uint8).reshape(height, width, 3)
    pixels = to_tensor(pattern, codec.config.image_size, codec.config.channels)
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()


def tables_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, dtypes, shapes and contents of the tables of a shard."""
    digest = hashlib.sha256()
    for name in sorted(tensors.keys() - set(LATENT_NAMES)):
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


def damaged_error(file: Path, what: str) -> ValueError:
    """The error for a damaged file of a cache."""
    return ValueError(f"{file} is damaged: {what}; copy it again, or delete the cache and run `lmfusion encode` again")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
