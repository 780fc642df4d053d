"""From an image that a source can load to the latents that are trained on: decoded, encoded, kept, or drawn."""

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

T = TypeVar("T")


class DamagedImageError(ValueError):
    """An image that its source could not load."""


class EncodedImages(Generic[T]):
    """What networks on `device` made of images, kept in memory up to `cache_megabytes`. Threads may share it."""

    def __init__(self, device: torch.device | str, cache_megabytes: int) -> None:
        self.device = torch.device(device)
        self._kept: dict[tuple[int, ...], T] = {}
        self._room = cache_megabytes * 2**20
        self._lock = threading.Lock()
        self._streams = threading.local()

    def kept(self, key: tuple[int, ...]) -> T | None:
        """What was made of the image that `key` identifies, while it is in memory."""
        return self._kept.get(key)

    def keep(self, key: tuple[int, ...], encoded: T, num_bytes: int) -> None:
        """Keep it, where there is room."""
        with self._lock:
            if num_bytes <= self._room and key not in self._kept:
                self._room -= num_bytes
                self._kept[key] = encoded

    def own_stream(self) -> AbstractContextManager[Any]:
        """On a GPU, a stream of this thread's: on the trainer's an image would wait for the steps queued there."""
        if self.device.type != "cuda":
            return nullcontext()
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream(self.device)
            # The network is being copied there
            self._streams.own.wait_stream(torch.cuda.default_stream(self.device))
        return torch.cuda.stream(self._streams.own)


class LatentReader:
    """Latents of images on the CPU, kept in memory up to `cache_megabytes`. Threads may use it at the same time."""

    def __init__(self, codec: Codec, device: torch.device | str, *, sample: bool, cache_megabytes: int) -> None:
        self.shape = (codec.latent_channels, codec.latent_size, codec.latent_size)
        """[C, h, w] of all of them."""
        self._codec = codec
        self._sample = sample
        self._encoded: EncodedImages[Latents] = EncodedImages(device, cache_megabytes)

    def read(self, key: tuple[int, ...], load_image: LoadImage, draw: Callable[[], np.random.Generator]) -> Tensor:
        """Latents float32 [C, h, w] of the image that `key` identifies: the mean, or a draw with `draw()`.

        Raises DamagedImageError where the image cannot be loaded, StorageError where its file cannot be read,
        ValueError for latents that do not fit the codec.
        """
        mean, std = self._latents(key, load_image)
        if not self._sample:
            return mean
        if std is None:
            raise ValueError(
                "data.sample_latents is true, but there is no variance to draw with: the codec has none, or latents "
                "were encoded without it. Set it to false, or encode them with --variance"
            )
        return mean + std * torch.from_numpy(draw().standard_normal(self.shape, np.float32))

    def _latents(self, key: tuple[int, ...], load_image: LoadImage) -> Latents:
        kept = self._encoded.kept(key)
        if kept is not None:
            return kept
        config = self._codec.config
        try:
            image = load_image()
            pixels = to_tensor(image, config.image_size, config.channels) if isinstance(image, Image.Image) else None
        except StorageError:
            raise
        except (ValueError, OSError) as error:
            raise DamagedImageError(str(error)) from error
        if pixels is None:  # a latent cache, which is quick to read
            assert isinstance(image, Latents)
            if image.mean.shape != self.shape:
                raise ValueError(
                    f"its latents have shape {list(image.mean.shape)}; the codec's have {list(self.shape)}"
                )
            return image
        # Encoded one by one, so that latents do not depend on who shares the row
        with self._encoded.own_stream():
            mean, std = self._codec.moments(pixels[None].to(self._encoded.device))
            latents = Latents(mean[0].cpu(), std[0].cpu() if self._sample and std is not None else None)
        self._encoded.keep(key, latents, sum(x.nbytes for x in latents if x is not None))
        return latents
