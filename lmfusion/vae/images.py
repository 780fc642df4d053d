"""Which images, and which noise, does a step of an autoencoder see? A pure function of its configuration and number."""

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
from lmfusion.images.formats import READ_SUFFIXES, UNREAD_SUFFIXES
from lmfusion.images.preprocessing import to_tensor
from lmfusion.utils.printing import printable
from lmfusion.utils.randomness import generator
from lmfusion.vae.config import AutoencoderConfig, ImageDataConfig


class ImageBatch(NamedTuple):
    """Images that can be read, on the CPU, and those that cannot."""

    images: Tensor
    """float32 [B, channels, H, W] in [-1, 1]"""
    noise: Tensor
    """Standard normal, float32 [B, latent channels, h, w]: what the posterior is drawn with."""
    sample_ids: tuple[str, ...]
    damaged: tuple[SkippedSample, ...]


class ImageLoader:
    """Batches of the images of a mixture of sources, by their positions in an endless sequence.

    Each source comes in a new order each epoch. What an image is drawn with depends on (seed, epoch, sample id) alone.
    Raises ValueError where a source is empty, or has no images.
    """

    def __init__(self, data: ImageDataConfig, config: AutoencoderConfig, seed: int) -> None:
        self._sources = [_load(source, config.image_size) for source in data.sources]
        for source, of in zip(self._sources, data.sources, strict=True):
            if len(source) == 0:
                raise ValueError(f"the data source {of.name} has no samples")
            report_unused(source, of.name)
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
        """Of all sources."""
        return sum(map(len, self._sources))

    def batches(self, first: int, last: int, batch_size: int) -> Generator[ImageBatch, None, None]:
        """Positions [first, last), `batch_size` at a time, prepared ahead in threads."""
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
        """uint8 [channels, H, W]; of a document of several images, one that the epoch picks."""
        loaders = _image_loaders(sample)
        if not loaders:
            raise ValueError(f"{sample.sample_id} has no image")
        which = 0
        if len(loaders) > 1:
            which = int(generator(self._seed, ref.epoch, sample.sample_id, "image").integers(len(loaders)))
        key = (ref.source, ref.index, which)
        if key in self._cache:
            return self._cache[key]
        image = loaders[which]()
        assert isinstance(image, Image.Image)  # sources of latents were refused
        pixels = to_tensor(image, self._config.image_size, self._config.channels)
        pixels = ((pixels + 1) * 127.5).round().to(torch.uint8)  # exactly what it was made of
        with self._cache_lock:  # several workers come here
            if pixels.numel() <= self._cache_room and key not in self._cache:
                self._cache_room -= pixels.numel()
                self._cache[key] = pixels
        return pixels


class FolderOfImages:
    """Every image in a folder and its subfolders, in order of path, with or without captions."""

    def __init__(self, path: str) -> None:
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(f"no folder of images at {path}")
        self._folder = folder
        files = [Path(name) for name, _ in find_all(folder)]
        self._files = sorted(file for file in files if suffix_of(file.name) in READ_SUFFIXES)
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
        raise ValueError(f"the data source {config.name} holds latents; an autoencoder is trained on images")
    if config.kind == "folder":
        assert config.path is not None
        return FolderOfImages(config.path)
    return load_source(config, image_size)


def _image_loaders(sample: Sample) -> list[LoadImage]:
    return [part for part in parts_of(sample) if callable(part)]
