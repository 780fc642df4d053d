"""Which batches does step number n train on? A pure function of the configuration and n, prepared ahead in threads."""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmfusion.batch import (
    Batch,
    Document,
    SpecialTokens,
    caption_first_document,
    encode_caption,
    image_first_document,
    pack,
)
from lmfusion.data.randomness import Permutation, generator
from lmfusion.data.sources import CaptionedImage, DataConfig, Source
from lmfusion.diffusion import DiffusionConfig
from lmfusion.image.codec import Codec
from lmfusion.image.preprocessing import to_tensor


@dataclass(frozen=True)
class LoaderState:
    """Where reading stands: the next row. Says nothing of ranks and workers, whose numbers may change."""

    window: int = 0
    row: int = 0
    """Of the window."""


class Damage(NamedTuple):
    """A sample that could not be read, and was left out."""

    sample_id: str
    reason: str


@dataclass(frozen=True)
class Step:
    """What one update is made of."""

    rows: list[Batch]
    """This rank's, in order, on the CPU. A row all of whose samples are damaged is an empty batch."""
    state: LoaderState
    """After this step."""
    epoch: float
    """Samples drawn up to and with this step, over those of all sources."""
    num_samples: int
    """Drawn by all ranks in this step, damaged ones included."""
    num_slots_used: int
    """Of the rows of all ranks, damaged samples included."""
    num_cut: int
    """Documents of all ranks that were cut to fit into a row."""
    damaged: tuple[Damage, ...]
    """Found by this rank. Those met before images are read are rank 0's, so that ranks can be added up."""


class BatchLoader:
    """Makes the micro-batches of any step from a source of captioned images.

    A step takes the next `batch_size` samples of an endless sequence: the source in a new order each epoch. What a
    sample becomes (document kind, caption, timestep, noise) depends on (seed, epoch, sample id) alone, so a run that
    resumes at a step, with other micro-batches or another number of workers, sees what it would have seen.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        *,
        codec: Codec,
        tokenizer: Any,
        tokens: SpecialTokens,
        tokens_per_image: int,
        diffusion: DiffusionConfig,
        batch_size: int,
        micro_batch_size: int | None = None,
        seed: int = 0,
        frozen_text: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        if len(source) == 0:
            raise ValueError(f"the data source {config.source!r} has no samples in split {config.split!r}")
        self.source = source
        self.config = config
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size or batch_size
        self._codec = codec
        self._tokens = tokens
        self._tokens_per_image = tokens_per_image
        self._diffusion = diffusion
        self._seed = seed
        self._frozen_text = frozen_text
        self._device = device
        self._encode_caption = lru_cache(maxsize=65536)(lambda caption: encode_caption(tokenizer, caption))
        self._order = lru_cache(maxsize=4)(lambda epoch: Permutation(len(source), seed, epoch))
        self._latents: dict[int, Tensor] = {}
        self._latents_room = config.cache_megabytes * 2**20
        self._latents_lock = threading.Lock()

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of one step, on the CPU. Raises ValueError, naming the sample, for data it cannot use."""
        first, last = step * self.batch_size, (step + 1) * self.batch_size
        return [
            self._batch(range(start, min(start + self.micro_batch_size, last)))
            for start in range(first, last, self.micro_batch_size)
        ]

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        """`step` of each number in range(first, last), prepared ahead by `num_workers` threads."""
        if self.config.num_workers == 0:
            yield from map(self.step, range(first, last))
            return
        ahead: deque[Future[list[Batch]]] = deque()
        with ThreadPoolExecutor(self.config.num_workers, thread_name_prefix="lmfusion-data") as pool:
            try:
                for step in range(first, last):
                    ahead.append(pool.submit(self.step, step))
                    if len(ahead) > self.config.num_workers:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def epoch(self, step: int) -> float:
        """How often the source has been gone through before `step`."""
        return step * self.batch_size / len(self.source)

    def _batch(self, positions: range) -> Batch:
        parts = [self._document(position) for position in positions]
        documents, latents, noise, timesteps, sample_ids = zip(*parts, strict=True)
        return pack(
            documents,
            torch.stack(latents),
            torch.stack(noise),
            torch.tensor(timesteps),
            sample_ids=sample_ids,
            frozen_text=self._frozen_text,
        )

    def _document(self, position: int) -> tuple[Document, Tensor, Tensor, int, str]:
        """Document, latents and noise [C, h, w], timestep and sample id at a position of the endless sequence."""
        epoch, place = divmod(position, len(self.source))
        index = self._order(epoch)[place]
        sample = self.source[index]
        # Four numbers, whatever becomes of them, so that changing one share does not change the other draws
        kind, drop, which, level = generator(self._seed, epoch, sample.sample_id, "document").random(4)
        is_image_first = kind < self.config.image_first
        caption = sample.captions[int(which * len(sample.captions))]
        try:
            caption_ids = self._encode_caption(caption)[: self.config.max_caption_tokens]
            latents = self._latents_of(index, sample)
        except (ValueError, OSError) as error:
            raise ValueError(f"sample {sample.sample_id}: {error}") from error
        if is_image_first:
            document = image_first_document(caption_ids, self._tokens_per_image, self._tokens)
            num_timesteps = self._diffusion.image_first_max_timestep + 1
        else:
            kept = [] if drop < self.config.caption_drop else caption_ids
            document = caption_first_document(kept, self._tokens_per_image, self._tokens)
            num_timesteps = self._diffusion.num_train_timesteps
        noise = generator(self._seed, epoch, sample.sample_id, "noise").standard_normal(latents.shape, np.float32)
        return document, latents, torch.from_numpy(noise), int(level * num_timesteps), sample.sample_id

    def _latents_of(self, index: int, sample: CaptionedImage) -> Tensor:
        """Latents [C, h, w] on the CPU. Encoded one by one, so that they do not depend on who shares the batch."""
        if index in self._latents:
            return self._latents[index]
        config = self._codec.config
        pixels = to_tensor(sample.load_image(), config.image_size, config.channels)
        latents = self._codec.encode(pixels[None].to(self._device))[0].cpu()
        num_bytes = latents.numel() * latents.element_size()
        with self._latents_lock:  # several workers come here
            if num_bytes <= self._latents_room and index not in self._latents:
                self._latents_room -= num_bytes
                self._latents[index] = latents
        return latents
