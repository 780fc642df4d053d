"""Which images of a sample does a vision-language model see, and what becomes of them? Rows of text, before training.

It sees what is shown to it: a user's images in a conversation, the source of an edit. Images that it is to draw, with
those of captions and interleaved documents, go the way of every other model's. How many rows an image takes depends on
its size, and documents are planned before any image is encoded; so it is decoded once for its size, and again for its
rows, unless these are still in memory.
"""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig

from lmfusion.data.pipeline.image_latents import DamagedImageError, EncodedImages
from lmfusion.data.samples import Conversation, Edit, Latents, LoadImage, Message, Sample, Transcript, Utterance
from lmfusion.data.storage.files import StorageError
from lmfusion.images.preprocessing import load_image
from lmfusion.model.vision import VisionEncoder, num_vision_tokens


@dataclass(frozen=True, slots=True)
class InputImageLoader:
    """An image that is seen, and the rows it takes. Calling it loads the image, as any other of a sample."""

    load: LoadImage
    num_rows: int

    def __call__(self) -> Image.Image | Latents:
        return self.load()


def with_input_images(sample: Sample, vlm_config: PreTrainedConfig) -> Sample:
    """`sample` with a `InputImageLoader` in place of every image that a model of `vlm_config` sees.

    Raises ValueError or OSError where such an image cannot be loaded, or comes from a latent cache.
    """

    def seen(load: LoadImage) -> InputImageLoader:
        image = load()
        if isinstance(image, Latents):
            raise ValueError(
                "a latent cache holds what is drawn, but a vision-language model sees this image: read conversations "
                "and edits from their own source"
            )
        upright = load_image(image)
        return InputImageLoader(load, num_vision_tokens(vlm_config, upright.height, upright.width))

    if isinstance(sample, Edit):
        return sample._replace(source=seen(sample.source))
    if isinstance(sample, Conversation):
        messages: list[Message] = []
        for message in sample.messages:
            parts = message["content"]
            if message["role"] != "assistant":
                parts = tuple(seen(part) if callable(part) else part for part in parts)
            messages.append({"role": message["role"], "content": parts})
        return sample._replace(messages=tuple(messages))
    if isinstance(sample, Transcript):
        utterances = (
            Utterance(seen(what) if callable(what) and not is_target else what, is_target)
            for what, is_target in sample.utterances
        )
        return sample._replace(utterances=tuple(utterances))
    return sample


class VisionReader:
    """Rows of images that are seen, on the CPU, kept in memory up to `cache_megabytes`. Threads may share it."""

    def __init__(self, vision: VisionEncoder, device: torch.device | str, *, cache_megabytes: int) -> None:
        self._vision = vision
        self._encoded: EncodedImages[Tensor] = EncodedImages(device, cache_megabytes)

    def read(self, key: tuple[int, ...], image: InputImageLoader) -> Tensor:
        """Rows [num_rows, d_text] of the image that `key` identifies, in the dtype of the encoder's weights.

        Raises DamagedImageError where the image cannot be loaded, or has changed its size.
        """
        kept = self._encoded.kept(key)
        if kept is not None:
            return kept
        try:
            prepared = self._vision.prepare(_picture(image))
        except StorageError:
            raise
        except (ValueError, OSError) as error:
            raise DamagedImageError(str(error)) from error
        if prepared.num_tokens != image.num_rows:
            raise DamagedImageError(f"the image took {image.num_rows} rows, and now takes {prepared.num_tokens}")
        with self._encoded.own_stream():
            [rows] = self._vision.encode([prepared])
            rows = rows.cpu()
        self._encoded.keep(key, rows, rows.nbytes)
        return rows


def _picture(image: InputImageLoader) -> Any:
    picture = image.load()
    assert isinstance(picture, Image.Image), "latents have no size"
    return picture
