"""How does a vision-language model see? Its own image processor, vision encoder and projector make rows of text.

A LLaVA-type model puts what it sees between its words: an image becomes rows as wide as the LLM's embeddings, which its
layers read as they read text, each seeing those before it. All of it is frozen. Images that are drawn have nothing to
do with it: those are rows of the image tower.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig
from transformers.image_processing_utils import select_best_resolution

from lmfusion.images.preprocessing import ImageSource, load_image

VLM_TYPES = ("llava_next", "llava")
"""Vision-language models, by the model_type of transformers."""
ENCODER_TYPES = ("clip_vision_model", "siglip_vision_model")


@dataclass(frozen=True, eq=False)
class VisionInput:
    """An image as the image processor of the vision-language model prepares it."""

    pixel_values: Tensor
    """float32 [num_tiles, 3, size, size]: the whole image and, of LLaVA-NeXT, its parts in a higher resolution."""
    height: int
    """Of the image itself, in pixels."""
    width: int
    num_rows: int
    """Rows of the text tower that it becomes."""


class VisionEncoder(nn.Module):
    """The part of a vision-language model that is not its LLM. Frozen.

    model: transformers' own class without its language model (vision tower, projector, LLaVA-NeXT's image_newline).
    image_processor: transformers', or None where none is known yet.
    """

    def __init__(self, config: PreTrainedConfig, device: torch.device | str = "cpu") -> None:
        """With random weights on `device`. Raises ValueError for a model that is not supported."""
        from transformers import AutoModel  # at the top it would import lmfusion.model.modeling, and that this module

        super().__init__()
        check_vlm(config, "vlm_config")
        config = copy.deepcopy(config)
        # Of the LLM no more than its width is wanted, which the projector has too
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
        """The id that stands for every row of an image in transformers' input_ids."""
        return self.config.image_token_id

    def check_image_processor(self) -> None:
        """Raise ValueError where there is no image processor, or one that makes tiles of other sizes than are read."""
        processor, size = self.image_processor, self.config.vision_config.image_size
        if processor is None:
            raise ValueError(
                "the vision-language model has no image processor; put its preprocessor_config.json or "
                "processor_config.json beside its config.json"
            )
        crop = processor.crop_size
        if crop is not None and (crop["height"], crop["width"]) != (size, size):
            raise ValueError(
                f"the image processor makes tiles of {crop['height']} x {crop['width']} pixels, but the vision encoder "
                f"reads {size} x {size}; take the processor's configuration from the same checkpoint"
            )
        if self.has_tiles:
            ours, theirs = (
                [tuple(pinpoint) for pinpoint in pinpoints]
                for pinpoints in (self.config.image_grid_pinpoints, processor.image_grid_pinpoints)
            )
            if ours != theirs:
                raise ValueError(
                    f"image_grid_pinpoints are {ours} in the model's configuration and {theirs} in the image "
                    "processor's; take both from the same checkpoint"
                )

    @property
    def has_tiles(self) -> bool:
        """Whether an image is read in several tiles, whose number depends on its size (LLaVA-NeXT)."""
        return self.config.model_type == "llava_next"

    def prepare(self, image: ImageSource) -> VisionInput:
        """`image` as the encoder reads it, at its own size and shape. Raises what `load_image` raises."""
        picture = load_image(image).convert("RGB")
        pixel_values = self.image_processor(picture, return_tensors="pt")["pixel_values"]
        tiles = pixel_values[0] if self.has_tiles else pixel_values
        num_rows = num_vision_tokens(self.config, picture.height, picture.width)
        return VisionInput(tiles, picture.height, picture.width, num_rows)

    @torch.no_grad()
    def encode(self, inputs: Sequence[VisionInput]) -> list[Tensor]:
        """Rows [num_rows, d_text] of each image, in the dtype and on the device of the weights.

        Images are encoded one by one, so that rows do not depend on who comes along.
        """
        encoded = []
        for image in inputs:
            sizes = torch.tensor([[image.height, image.width]])
            [rows] = self.encode_pixels(image.pixel_values[None] if self.has_tiles else image.pixel_values, sizes)
            assert rows.shape[0] == image.num_rows
            encoded.append(rows)
        return encoded

    @torch.no_grad()
    def encode_pixels(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> list[Tensor]:
        """Rows of each image from what transformers' processor gives: pixel_values, and image_sizes of LLaVA-NeXT.

        Raises ValueError where these are missing.
        """
        if self.has_tiles and image_sizes is None:
            raise ValueError("image_sizes are missing, which say how tiles lie; take them from the processor")
        weight = next(self.parameters())
        sizes = {"image_sizes": image_sizes} if self.has_tiles else {}
        features = self.model.get_image_features(
            pixel_values.to(weight.device, weight.dtype), return_dict=True, **sizes
        )
        return list(features.pooler_output)


def num_vision_tokens(config: PreTrainedConfig, height: int, width: int) -> int:
    """Rows that an image of so many pixels becomes in a vision-language model of `config`.

    As many as transformers' processor writes image tokens.
    """
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    if config.model_type != "llava_next":
        has_class_row = vision.model_type == "clip_vision_model"
        # "default" leaves out the first row, whatever it is
        return side * side + int(has_class_row) - int(config.vision_feature_select_strategy == "default")
    rows, columns = (
        pixels // vision.image_size * side
        for pixels in select_best_resolution((height, width), config.image_grid_pinpoints)
    )
    from transformers.models.llava_next.modeling_llava_next import unpad_image  # imports AutoModel

    unpadded = unpad_image(torch.empty(1, rows, columns, device="meta"), (height, width))
    return side * side + unpadded.shape[1] * (unpadded.shape[2] + 1)  # each line ends with image_newline


def check_vlm(config: PreTrainedConfig, where: str) -> None:
    """Raise ValueError naming what in `config` (of the checkpoint at `where`) is not supported, and what is."""
    supported = f"supported: {', '.join(VLM_TYPES)}, with a vision encoder of {' or '.join(ENCODER_TYPES)}"
    if config.model_type not in VLM_TYPES:
        raise ValueError(f"{where} is a vision-language model of type {config.model_type!r}; {supported}")
    vision, strategy = config.vision_config, config.vision_feature_select_strategy
    if vision.model_type not in ENCODER_TYPES:
        raise ValueError(f"{where} has a vision encoder of type {vision.model_type!r}; {supported}")
    has_class_row = vision.model_type == "clip_vision_model"
    if config.model_type == "llava_next" and has_class_row != (strategy == "default"):
        raise ValueError(
            f"{where} has vision_feature_select_strategy {strategy!r}, which leaves no square of rows a tile; with a "
            f"vision encoder of type {vision.model_type!r} it is {'default' if has_class_row else 'full'!r}"
        )
