"""Turns an image that a source can load into the latents it is trained on: decodes, encodes, caches and samples."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lmfusion.data.samples import Latents, LoadImage
from lmfusion.data.storage.files import StorageError
from lmfusion.images.preprocessing import to_tensor
from lmfusion.model.codec import Codec
from lmfusion.utils.byte_cache import ByteCache

T = TypeVar("T")


class DamagedImageError(ValueError):
    """An image that its source could not load."""


class EncoderCache(Generic[T]):
    """What a network on `device` made of images, kept in memory up to `cache_megabytes`. Threads may share it."""

    def __init__(self, device: torch.device | str, cache_megabytes: int) -> None:
        self.device = torch.device(device)
        # Each image is needed once an epoch. With eviction, most would be gone before they are needed again.
        self._cache: ByteCache[T] = ByteCache(cache_megabytes * 2**20, evicts=False)
        self._streams = threading.local()

    def get(self, key: tuple[int, ...], make: Callable[[], tuple[T, int | None]]) -> T:
        """What was made of the image that `key` identifies; else what `make` returns, as in ByteCache.get."""
        return self._cache.get(key, make)

    def own_stream(self) -> AbstractContextManager[Any]:
        """On a GPU, a stream of this thread's own: on the trainer's stream, images would wait for queued steps."""
        if self.device.type != "cuda":
            return nullcontext()
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream(self.device)
            # The network's weights may still be on their way to the device, on the default stream.
            self._streams.own.wait_stream(torch.cuda.default_stream(self.device))
        return torch.cuda.stream(self._streams.own)


class LatentReader:
    """Latents of images, on the CPU, kept in memory up to `cache_megabytes`. Threads may use it at the same time.

    sample: whether latents are sampled from the codec's posterior; else they are its mean.
    """

    def __init__(self, codec: Codec, device: torch.device | str, *, sample: bool, cache_megabytes: int) -> None:
        self.shape = (codec.latent_channels, codec.latent_size, codec.latent_size)
        """[C, h, w] of all latents."""
        self._codec = codec
        self._sample = sample
        self._encoded: EncoderCache[Latents] = EncoderCache(device, cache_megabytes)

    def read(self, key: tuple[int, ...], load_image: LoadImage, make_rng: Callable[[], np.random.Generator]) -> Tensor:
        """Latents float32 [C, h, w] of the image that `key` identifies: the mean, or a sample from `make_rng()`.

        Raises DamagedImageError where the image cannot be loaded, StorageError where its file cannot be read,
        ValueError for latents that do not fit the codec.
        """
        mean, std = self._encoded.get(key, lambda: self._load(load_image))
        if not self._sample:
            return mean
        if std is None:
            raise ValueError(
                "data.sample_latents is true, but there is no variance to sample with: the codec has none, or the "
                "latents were encoded without it. Set it to false, or encode them with --variance"
            )
        return mean + std * torch.from_numpy(make_rng().standard_normal(self.shape, np.float32))

    def _load(self, load_image: LoadImage) -> tuple[Latents, int | None]:
        """Latents and their size in bytes; None for those of a latent cache on the disk, which are not kept."""
        config = self._codec.config
        try:
            image = load_image()
            pixels = to_tensor(image, config.image_size, config.channels) if isinstance(image, Image.Image) else None
        except StorageError:
            raise
        except (ValueError, OSError) as error:
            raise DamagedImageError(str(error)) from error
        if pixels is None:
            assert isinstance(image, Latents)
            if image.mean.shape != self.shape:
                raise ValueError(
                    f"the latents must have the codec's shape {list(self.shape)}, got {list(image.mean.shape)}"
                )
            return image, None
        # Images are encoded one by one, so that the bits of their latents do not depend on the rest of the batch.
        with self._encoded.own_stream():
            mean, std = self._codec.moments(pixels[None].to(self._encoded.device))
            latents = Latents(mean[0].cpu(), std[0].cpu() if self._sample and std is not None else None)
        return latents, sum(x.nbytes for x in latents if x is not None)
