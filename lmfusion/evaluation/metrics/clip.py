"""Features of images and texts by CLIP (Radford et al. 2021), loaded from a local folder in transformers' format.

Images are resized and normalised here as in the paper's code: the shorter side with Pillow's bicubic filter, a square
from the centre, then mean and standard deviation from the folder's preprocessor_config.json.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lmfusion.utils.json_files import read_json_object

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of pixel values in [0, 1], as CLIP was trained. Used without preprocessor_config.json."""


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP model: its image and text encoders."""

    model: Any
    """transformers.CLIPModel, frozen."""
    tokenizer: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: tuple[Path, ...]
    """Weight files, sorted by name."""

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def input_size(self) -> int:
        return int(self.model.config.vision_config.image_size)

    @property
    def width(self) -> int:
        """Number of features of an image or a text."""
        return int(self.model.config.projection_dim)

    @property
    def max_tokens(self) -> int:
        """Longer texts are truncated."""
        return int(self.model.config.text_config.max_position_embeddings)

    @property
    def resize(self) -> str:
        return "shorter side by Pillow bicubic, centre crop to a square"

    @property
    def normalisation(self) -> str:
        return f"(pixel / 255 - {list(self.mean)}) / {list(self.std)}"

    def prepare(self, image: Image.Image) -> Tensor:
        """An image as network input, float32 [3, size, size]."""
        size = self.input_size
        width, height = image.size
        shorter = min(width, height)
        image = image.convert("RGB").resize(
            (int(size * width / shorter), int(size * height / shorter)), Image.Resampling.BICUBIC
        )
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
        pixels = np.asarray(image, dtype=np.float32) / 255
        normalised = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(normalised).permute(2, 0, 1)

    @torch.inference_mode()
    def image_features(self, pixels: Tensor) -> Tensor:
        """Features [B, width] of prepared images [B, 3, size, size], not normalised to length 1."""
        output = self.model.vision_model(pixel_values=pixels.to(self.device))
        features: Tensor = self.model.visual_projection(output.pooler_output)
        return features

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Features [B, width] of texts, not normalised to length 1."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        output = self.model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        features: Tensor = self.model.text_projection(output.pooler_output)
        return features


def load_clip(folder: Path, device: torch.device | str = "cpu") -> Clip:
    """The CLIP in `folder`, in float32.

    Raises FileNotFoundError if the folder does not exist, ValueError if it does not hold a CLIP.
    """
    from transformers import CLIPConfig, CLIPModel

    from lmfusion.conversion.huggingface import without_code
    from lmfusion.conversion.tokenizer import read_tokenizer

    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{folder} must hold a config.json, got none; give a folder with a CLIP that transformers can load"
        )
    settings = read_json_object(config_file, strict=False)
    if settings.get("model_type") != "clip":
        raise ValueError(f"{folder} must hold a model of type 'clip', got {settings.get('model_type')!r}")
    weights = tuple(sorted(folder.glob("*.safetensors")))
    if not weights:
        raise ValueError(f"{folder} must hold weights as safetensors, got none; save the CLIP with save_pretrained")
    processor_file = folder / "preprocessor_config.json"
    processor = read_json_object(processor_file, strict=False) if processor_file.is_file() else {}
    try:
        model = CLIPModel.from_pretrained(
            folder,
            config=CLIPConfig.from_dict(without_code(settings)),
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
        )
        tokenizer = read_tokenizer(folder)
    except Exception as error:  # transformers raises many types for files that do not fit together
        raise ValueError(f"{folder} must hold a CLIP that transformers can load, got {error}") from error
    if tokenizer is None:
        raise ValueError(f"{folder} must hold the tokenizer of the CLIP, got none; save it with save_pretrained")
    model.eval().requires_grad_(False).to(device)
    mean, std = (tuple(processor.get(key, given)) for key, given in (("image_mean", MEAN), ("image_std", STD)))
    return Clip(model, tokenizer, mean, std, weights)
