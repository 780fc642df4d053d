"""Reads the samples of a latent cache (the source `latents`) from its mapped shards. See `format` for their layout."""

from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmfusion.data.config import KINDS_WITH_CONVERSATIONS
from lmfusion.data.latent_cache.format import (
    CONVERSATION,
    EDIT,
    IMAGE,
    INTERLEAVED,
    INVALID_TEXT,
    LATENT_NAMES,
    MANIFEST,
    TARGET_IMAGE,
    TARGET_TEXT,
    TEMPLATE_VARIABLES,
    ShardRecord,
    check_same,
    checksum,
    damaged_error,
    made_with,
    read_manifest,
    shard_name,
    tables_sha256,
)
from lmfusion.data.samples import (
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
from lmfusion.model.codec import Codec
from lmfusion.text.chat_template import TODAY

MAX_OPEN_SHARDS = 16384
"""Shards mapped at a time; systems usually allow a process 65,530 mappings."""


class LatentShards:
    """The source `latents`: the latent cache in the folder `path`, as `lmfusion encode` wrote it.

    Its samples have the ids, order and blocks of the source that was encoded, captions as token ids, and images as
    `Latents` in float32. A sample that was damaged when it was encoded raises the same ValueError here.

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
            self.shards = tuple(ShardRecord.parse(values) for values in self.manifest["shards"])
        except (KeyError, TypeError, ValueError) as error:
            raise damaged_error(self.folder / MANIFEST, f"{error!r}") from error
        self._damage = {
            (record.index, record.image): record.reason for shard in self.shards for record in shard.damaged
        }
        for number, shard in enumerate(self.shards):
            file = self.folder / shard_name(number)
            if not file.is_file():
                raise damaged_error(file, "it is missing")
            if file.stat().st_size != shard.size:
                raise damaged_error(file, f"it must have {shard.size} bytes, got {file.stat().st_size}")
        self._open_shard = lru_cache(MAX_OPEN_SHARDS)(self._map_shard)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._num_samples:
            raise IndexError(f"the index of a sample must be in [0, {self._num_samples}), got {index}")
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
            if part in (IMAGE, TARGET_IMAGE):
                parts.append(partial(self._load, index, image - first_image, number, image))
                image += 1
            elif part == INVALID_TEXT:
                parts.append("\ud800")  # half a surrogate pair: rejected later, like the text it replaces
            else:
                parts.append(tables["token_ids"][slice(*_span(tables["first_token"], text))].numpy().copy())
                text += 1
        if int(tables["kinds"][i]) == INTERLEAVED:
            return Interleaved(sample_id, tuple(parts))
        if int(tables["kinds"][i]) == CONVERSATION:
            is_target = (part in (TARGET_TEXT, TARGET_IMAGE) for part in kinds)
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
        date is left out: a cache keeps the date on which it was begun."""
        if self.plan["source"]["kind"] in KINDS_WITH_CONVERSATIONS:
            now, was = (
                {name: value for name, value in values.items() if name != TODAY}
                for values in (template_variables, self.plan.get(TEMPLATE_VARIABLES, {}))
            )
            if now != was:
                raise ValueError(
                    f"model.template_variables must be {was}, with which the latent cache {self.folder} was made, got "
                    f"{now}; change them, or make another cache with `lmfusion encode`"
                )

    def _load(self, index: int, which: int, number: int, image: int) -> Latents:
        """The latents of image `which` of sample `index`, which is image `image` of shard `number`."""
        if (reason := self._damage.get((index, which))) is not None:
            raise ValueError(reason)
        tensors = self._open_shard(number)
        stored = [tensors[name][image] for name in LATENT_NAMES[: 1 + self.has_std]]
        if checksum(stored) != int(tensors["checksums"][image]):
            file = self.folder / shard_name(number)
            raise damaged_error(file, f"the latents of sample {index} are not what was written")
        mean, *std = (tensor.to(torch.float32, copy=True) for tensor in stored)
        return Latents(mean, std[0] if std else None)

    def _map_shard(self, number: int) -> dict[str, Tensor]:
        """Tensors of a shard by name, backed by the mapped file. Raises ValueError where they have changed."""
        file, record = self.folder / shard_name(number), self.shards[number]
        try:
            with retry(lambda: safe_open(file, framework="pt"), str(file)) as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            digest = tables_sha256(tensors)
        except StorageError:
            raise
        except (SafetensorError, OSError, RuntimeError, TypeError, UnicodeDecodeError) as error:
            raise damaged_error(file, str(error)) from error
        dtype, shape = getattr(torch, self.plan["dtype"]), (record.num_images, *self.plan["latent_shape"])
        for name in LATENT_NAMES[: 1 + self.has_std]:
            latents = tensors.get(name)
            if latents is None or latents.dtype != dtype or tuple(latents.shape) != shape:
                raise damaged_error(file, f"its tensor {name!r} must be {self.plan['dtype']} {list(shape)}")
        if digest != record.tables_sha256:
            raise damaged_error(file, "its tables are not what was written")
        return tensors


def _span(first: Tensor, i: int) -> tuple[int, int]:
    begin, end = first[i : i + 2].tolist()
    return begin, end
