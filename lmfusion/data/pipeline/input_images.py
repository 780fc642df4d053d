"""Input images of a vision-language model: finds them in samples, and turns them into embeddings for the text tower.

Input images are a user's images in a conversation and the source of an edit. Target images, and the images of captions
and interleaved documents, are treated as in every other model. The number of vision tokens of an input image depends on
its size, and documents are planned before any image is encoded. So an input image is decoded twice: for its size, and
for its embeddings, unless these are still in memory.
"""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig

from lmfusion.data.pipeline.image_latents import DamagedImageError, EncoderCache
from lmfusion.data.samples import Conversation, Edit, Latents, LoadImage, Message, Sample, Transcript, Utterance
from lmfusion.data.storage.files import StorageError
from lmfusion.images.preprocessing import load_image
from lmfusion.model.vision import VisionEncoder, num_vision_tokens


@dataclass(frozen=True, slots=True)
class InputImageLoader:
    """An input image and the number of its vision tokens. Calling it loads the image, like any LoadImage."""

    load: LoadImage
    num_tokens: int

    def __call__(self) -> Image.Image | Latents:
        return self.load()


def with_input_images(sample: Sample, vlm_config: PreTrainedConfig) -> Sample:
    """`sample` with an `InputImageLoader` in place of every input image of a model of `vlm_config`.

    Raises ValueError or OSError where such an image cannot be loaded, or comes from a latent cache.
    """

    def as_input(load: LoadImage) -> InputImageLoader:
        image = load()
        if isinstance(image, Latents):
            raise ValueError(
                "a latent cache holds latents of target images, but this is an input image of a vision-language model: "
                "read conversations and edits from their own source"
            )
        upright = load_image(image)
        return InputImageLoader(load, num_vision_tokens(vlm_config, upright.height, upright.width))

    if isinstance(sample, Edit):
        return sample._replace(source=as_input(sample.source))
    if isinstance(sample, Conversation):
        messages: list[Message] = []
        for message in sample.messages:
            parts = message["content"]
            if message["role"] != "assistant":
                parts = tuple(as_input(part) if callable(part) else part for part in parts)
            messages.append({"role": message["role"], "content": parts})
        return sample._replace(messages=tuple(messages))
    if isinstance(sample, Transcript):
        utterances = (
            Utterance(as_input(what) if callable(what) and not is_target else what, is_target)
            for what, is_target in sample.utterances
        )
        return sample._replace(utterances=tuple(utterances))
    return sample


class VisionReader:
    """Embeddings of input images, on the CPU, kept in memory up to `cache_megabytes`. Threads may share it."""

    def __init__(self, vision: VisionEncoder, device: torch.device | str, *, cache_megabytes: int) -> None:
        self._vision = vision
        self._encoded: EncoderCache[Tensor] = EncoderCache(device, cache_megabytes)

    def read(self, key: tuple[int, ...], image: InputImageLoader) -> Tensor:
        """Embeddings [num_tokens, d_text] of the image that `key` identifies, in the dtype of the encoder's weights.

        Raises DamagedImageError where the image cannot be loaded, or has changed its size.
        """
        return self._encoded.get(key, lambda: self._encode(image))

    def _encode(self, image: InputImageLoader) -> tuple[Tensor, int]:
        """The embeddings and their size in bytes."""
        try:
            prepared = self._vision.prepare(_load(image))
        except StorageError:
            raise
        except (ValueError, OSError) as error:
            raise DamagedImageError(str(error)) from error
        if prepared.num_tokens != image.num_tokens:
            raise DamagedImageError(
                f"the image must still have {image.num_tokens} vision tokens, got {prepared.num_tokens}; its file has "
                "changed"
            )
        with self._encoded.own_stream():
            [embeddings] = self._vision.encode([prepared])
            embeddings = embeddings.cpu()
        return embeddings, embeddings.nbytes


def _load(image: InputImageLoader) -> Any:
    loaded = image.load()
    assert isinstance(loaded, Image.Image), "latents have no size"
    return loaded
