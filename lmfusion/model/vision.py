"""Encodes the input images of a vision-language model with its own image processor, vision encoder and projector.

A LLaVA-type model puts images between its words: an image becomes vision tokens as wide as the LLM's embeddings, which
its layers process like text, with causal attention. All of it is frozen. Images to generate do not pass through it:
they are image tokens of the image tower.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, PreTrainedConfig
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from lmfusion.conversion.architectures import check_vlm
from lmfusion.images.preprocessing import ImageSource, load_image
from lmfusion.utils.config_values import short_repr


@dataclass(frozen=True, eq=False)
class VisionInput:
    """An image as the image processor of the vision-language model prepares it."""

    pixel_values: Tensor
    """float32 [num_tiles, 3, size, size]: the whole image and, for LLaVA-NeXT, its parts in a higher resolution."""
    height: int
    """Of the image itself, in pixels."""
    width: int
    num_tokens: int
    """Vision tokens of the text tower that it becomes."""


class VisionEncoder(nn.Module):
    """A vision-language model without its LLM. Frozen.

    model: transformers' own class without its language model (vision tower, projector, LLaVA-NeXT's image_newline).
    image_processor: transformers', or None as long as none is known.
    """

    def __init__(self, config: PreTrainedConfig, device: torch.device | str = "cpu") -> None:
        """With random weights on `device`. Raises ValueError for a model that is not supported."""
        super().__init__()
        check_vlm(config, "vlm_config")
        config = copy.deepcopy(config)
        # The smallest LLM of the right width, which the projector needs; it is deleted below
        config.text_config = LlamaConfig(
            vocab_size=1,
            hidden_size=config.text_config.hidden_size,
            intermediate_size=1,
            num_hidden_layers=0,
            num_attention_heads=1,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        with torch.device(device):
            self.model: Any = AutoModel.from_config(config)
        del self.model.language_model
        self.config = config
        self.image_processor: Any = None
        self.requires_grad_(False)
        self.eval()

    @property
    def image_token_id(self) -> int:
        """The id of every vision token in transformers' input_ids."""
        return self.config.image_token_id

    def check_image_processor(self) -> None:
        """Raise ValueError without an image processor, or where its tiles are not of the encoder's size."""
        processor, size = self.image_processor, self.config.vision_config.image_size
        if processor is None:
            raise ValueError(
                "the vision-language model has no image processor; put its preprocessor_config.json or "
                "processor_config.json beside its config.json"
            )
        crop = processor.crop_size
        if crop is not None and (crop["height"], crop["width"]) != (size, size):
            raise ValueError(
                f"the image processor must make tiles of {size} x {size} pixels, which the vision encoder takes, got "
                f"{crop['height']} x {crop['width']}; take the processor's configuration from the same checkpoint"
            )
        if self.has_tiles:
            ours, theirs = (
                [tuple(pinpoint) for pinpoint in pinpoints]
                for pinpoints in (self.config.image_grid_pinpoints, processor.image_grid_pinpoints)
            )
            if ours != theirs:
                raise ValueError(
                    "image_grid_pinpoints must be the same for the model and its image processor, got "
                    f"{short_repr(ours)} and {short_repr(theirs)}; take both from the same checkpoint"
                )

    @property
    def has_tiles(self) -> bool:
        """Whether an image is read in several tiles, whose number depends on its size (LLaVA-NeXT)."""
        return self.config.model_type == "llava_next"

    def prepare(self, image: ImageSource) -> VisionInput:
        """`image` prepared for the encoder, at its own size and shape. Raises what `load_image` raises."""
        picture = load_image(image).convert("RGB")
        pixel_values = self.image_processor(picture, return_tensors="pt")["pixel_values"]
        tiles = pixel_values[0] if self.has_tiles else pixel_values
        num_tokens = num_vision_tokens(self.config, picture.height, picture.width)
        return VisionInput(tiles, picture.height, picture.width, num_tokens)

    @torch.no_grad()
    def encode(self, inputs: Sequence[VisionInput]) -> list[Tensor]:
        """Embeddings [num_tokens, d_text] of each image, in the dtype and on the device of the weights.

        Images are encoded one by one, so that the result does not depend on which others are in the batch.
        """
        encoded = []
        for image in inputs:
            sizes = torch.tensor([[image.height, image.width]])
            [embeddings] = self.encode_pixels(image.pixel_values[None] if self.has_tiles else image.pixel_values, sizes)
            assert embeddings.shape[0] == image.num_tokens
            encoded.append(embeddings)
        return encoded

    @torch.no_grad()
    def encode_pixels(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> list[Tensor]:
        """Embeddings of each image from the outputs of transformers' processor.

        image_sizes: needed for LLaVA-NeXT. Raises ValueError where they are missing.
        """
        if self.has_tiles and image_sizes is None:
            raise ValueError(
                "image_sizes must be given, since they say how tiles are arranged; take them from the processor"
            )
        weight = next(self.parameters())
        sizes = {"image_sizes": image_sizes} if self.has_tiles else {}
        features = self.model.get_image_features(
            pixel_values.to(weight.device, weight.dtype), return_dict=True, **sizes
        )
        return list(features.pooler_output)


def num_vision_tokens(config: PreTrainedConfig, height: int, width: int) -> int:
    """Vision tokens that an image of height x width pixels becomes in a vision-language model of `config`.

    transformers' processor writes the same number of image tokens.
    """
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    if config.model_type != "llava_next":
        has_class_token = vision.model_type == "clip_vision_model"
        # "default" leaves out the first token, which is a patch where the encoder has no class token
        return side * side + int(has_class_token) - int(config.vision_feature_select_strategy == "default")
    rows, columns = (
        pixels // vision.image_size * side
        for pixels in select_best_resolution((height, width), config.image_grid_pinpoints)
    )
    unpadded = unpad_image(torch.empty(1, rows, columns, device="meta"), (height, width))
    return side * side + unpadded.shape[1] * (unpadded.shape[2] + 1)  # image_newline ends each line
