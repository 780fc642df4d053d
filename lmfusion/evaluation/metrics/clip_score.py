"""CLIP score (Hessel et al. 2021): how well images fit their captions, by the cosine of CLIP's features of both.

The score of an image is 100 * max(cosine, 0), as in torchmetrics; the paper's numbers are 2.5 / 100 times these. Only
scores by the same CLIP weights can be compared.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from lmfusion.evaluation.metrics.clip import Clip, load_clip
from lmfusion.evaluation.metrics.extractors import weights_digest


class ClipScorer:
    """CLIP score by the CLIP in a folder. Raises what `load_clip` raises."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu", batch_size: int = 32) -> None:
        self.clip: Clip = load_clip(folder, device)
        self.name = f"CLIP {folder.name}"
        self.batch_size = batch_size

    @property
    def details(self) -> dict[str, Any]:
        """What a comparison of scores needs to know, as JSON values."""
        return {
            "clip": self.name,
            "weights_sha256": weights_digest(self.clip.weights),
            "input_size": self.clip.input_size,
            "resize": self.clip.resize,
            "normalisation": self.clip.normalisation,
            "max_tokens": self.clip.max_tokens,
        }

    def scores(self, images: Iterable[Image.Image], captions: Sequence[str]) -> np.ndarray:
        """Scores of images with their captions, float64 [n], from 0 to 100. The score of the set is their mean.

        Raises ValueError for different numbers of images and captions.
        """
        remaining, cosines, start = iter(images), [], 0
        while batch := list(islice(remaining, self.batch_size)):
            texts = captions[start : start + len(batch)]
            if len(texts) < len(batch):
                raise ValueError(f"each image must have one caption, got {len(captions)} captions for more images")
            start += len(batch)
            pixels = torch.stack([self.clip.prepare(image) for image in batch])
            similarity = F.cosine_similarity(self.clip.image_features(pixels), self.clip.text_features(texts))
            cosines.append(similarity.double().cpu().numpy())
        if start < len(captions):
            raise ValueError(f"each image must have one caption, got {len(captions)} captions for {start} images")
        return 100 * np.maximum(np.concatenate([np.zeros(0), *cosines]), 0)
