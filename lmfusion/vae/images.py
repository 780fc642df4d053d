"""The images and noise of each step of an autoencoder: a pure function of the configuration and the step's number."""

import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lmfusion.data.config import SourceConfig
from lmfusion.data.pipeline.documents import SkippedSample
from lmfusion.data.pipeline.mixture import Mixture, SampleRef
from lmfusion.data.pipeline.order import SourceOrder
from lmfusion.data.registry import load_source
from lmfusion.data.samples import CaptionedImage, LoadImage, Sample, Source, parts_of
from lmfusion.data.sources.unused_files import (
    UnusedFiles,
    report_unused,
    suffix_of,
    unread_kind,
)
from lmfusion.data.storage.files import StorageError, load_image_file
from lmfusion.data.storage.folder_walk import find_all
from lmfusion.images.formats import IMAGE_SUFFIXES, UNREAD_SUFFIXES
from lmfusion.images.preprocessing import to_tensor
from lmfusion.utils.printing import printable
from lmfusion.utils.randomness import generator
from lmfusion.vae.config import AutoencoderConfig, ImageDataConfig


class ImageBatch(NamedTuple):
    """The images of one step on the CPU, and the samples that could not be read."""

    images: Tensor
    """float32 [B, channels, H, W] in [-1, 1]"""
    noise: Tensor
    """Standard normal, float32 [B, latent channels, h, w], to sample from the posterior"""
    sample_ids: tuple[str, ...]
    damaged: tuple[SkippedSample, ...]


class ImageLoader:
    """Batches of the images of a mixture of sources, by their positions in an endless sequence.

    Each source is shuffled again in each epoch. The noise of an image depends only on (seed, epoch, sample id). Raises
    ValueError if a source is empty or holds no images.
    """

    def __init__(self, data: ImageDataConfig, config: AutoencoderConfig, seed: int) -> None:
        self._sources = [_load(source, config.image_size) for source in data.sources]
        for source, source_config in zip(self._sources, data.sources, strict=True):
            if len(source) == 0:
                raise ValueError(f"the data source {source_config.name} must have samples, got none")
            report_unused(source, source_config.name)
        self._names = [source.name for source in data.sources]
        orders = [SourceOrder(s.blocks, data.shuffle_blocks, seed, f"source {i}") for i, s in enumerate(self._sources)]
        self._mixture = Mixture(orders, [source.weight for source in data.sources], seed)
        self._config = config
        self._seed = seed
        self._num_workers = data.num_workers
        self._cache: dict[tuple[int, int, int], Tensor] = {}
        self._cache_room = data.cache_megabytes * 2**20
        self._cache_lock = threading.Lock()

    @property
    def num_samples(self) -> int:
        """Samples of all sources."""
        return sum(map(len, self._sources))

    def batches(self, first: int, last: int, batch_size: int) -> Generator[ImageBatch, None, None]:
        """Batches of the positions [first, last), `batch_size` at a time; threads prepare them ahead."""
        coming = (range(start, min(start + batch_size, last)) for start in range(first, last, batch_size))
        ahead: deque[Future[ImageBatch]] = deque()
        with ThreadPoolExecutor(self._num_workers, thread_name_prefix="lmfusion-data") as pool:
            try:
                ahead.extend(pool.submit(self._batch, positions) for positions in islice(coming, self._num_workers))
                while ahead:
                    ahead.extend(pool.submit(self._batch, positions) for positions in islice(coming, 1))
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def _batch(self, positions: range) -> ImageBatch:
        config = self._config
        images, noise, sample_ids, damaged = [], [], [], []
        for ref in self._mixture.samples(positions):
            name = f"{self._names[ref.source]}, sample {ref.index}"
            try:
                sample = self._sources[ref.source][ref.index]
                name = sample.sample_id
                images.append(self._pixels(ref, sample))
            except StorageError:
                raise
            except (ValueError, OSError) as error:
                damaged.append(SkippedSample(name, str(error)))
                continue
            rng = generator(self._seed, ref.epoch, name, "posterior")
            noise.append(torch.from_numpy(rng.standard_normal(config.latent_shape, np.float32)))
            sample_ids.append(name)
        size = config.image_size
        return ImageBatch(
            torch.stack(images).float() / 127.5 - 1 if images else torch.empty(0, config.channels, size, size),
            torch.stack(noise) if noise else torch.empty(0, *config.latent_shape),
            tuple(sample_ids),
            tuple(damaged),
        )

    def _pixels(self, ref: SampleRef, sample: Sample) -> Tensor:
        """Pixels, uint8 [channels, H, W]. Of a document with several images, each epoch chooses one."""
        loaders = _image_loaders(sample)
        if not loaders:
            raise ValueError(f"{sample.sample_id} has no image")
        chosen = 0
        if len(loaders) > 1:
            chosen = int(generator(self._seed, ref.epoch, sample.sample_id, "image").integers(len(loaders)))
        key = (ref.source, ref.index, chosen)
        if key in self._cache:
            return self._cache[key]
        image = loaders[chosen]()
        assert isinstance(image, Image.Image)  # `_load` refuses sources of latents
        pixels = to_tensor(image, self._config.image_size, self._config.channels)
        pixels = ((pixels + 1) * 127.5).round().to(torch.uint8)  # exact: the pixels were uint8 before
        with self._cache_lock:  # several workers run this
            if pixels.numel() <= self._cache_room and key not in self._cache:
                self._cache_room -= pixels.numel()
                self._cache[key] = pixels
        return pixels


class FolderOfImages:
    """Every image in a folder and its subfolders, in order of path, with or without captions."""

    def __init__(self, path: str) -> None:
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(f"there must be a folder of images at {path}")
        self._folder = folder
        files = [Path(name) for name, _ in find_all(folder)]
        self._files = sorted(file for file in files if suffix_of(file.name) in IMAGE_SUFFIXES)
        unused = UnusedFiles()
        for file in files:
            if suffix_of(file.name) in UNREAD_SUFFIXES:
                unused.add(unread_kind(file.name), printable(file.as_posix()))
        self.unused = unused.list()

    @property
    def blocks(self) -> Sequence[int]:
        return [len(self)]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> CaptionedImage:
        file = self._files[index]
        return CaptionedImage(file.as_posix(), partial(load_image_file, self._folder / file), ())


def _load(config: SourceConfig, image_size: int) -> Source:
    if config.kind == "latents":
        raise ValueError(f"the data source {config.name} must hold images, got latents")
    if config.kind == "folder":
        assert config.path is not None
        return FolderOfImages(config.path)
    return load_source(config, image_size)


def _image_loaders(sample: Sample) -> list[LoadImage]:
    return [part for part in parts_of(sample) if callable(part)]
