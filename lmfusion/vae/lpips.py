"""LPIPS (Zhang et al., 2018): the perceptual distance of two images, from the features of a VGG-16.

The VGG-16 (an ImageNet classifier, 0.5 GB) is read from a local safetensors file. The weights of its features in the
sum, 1,472 numbers fitted to human judgement, come with this package.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG-16's convolutions, by stage. The features at the end of each stage are compared."""
SMALLEST_IMAGE = 2 ** (len(WIDTHS) - 1)
"""Pixels per side: every stage after the first begins by halving them."""

HEADS = Path(__file__).with_name("lpips_heads.safetensors")


class LPIPS(nn.Module):
    """Distance [B] of images [B, 1 | 3, H, W] in [-1, 1], 0 for equal ones. Its weights are frozen.

    vgg16: a safetensors file with the names of torchvision and timm, `features.0.weight` and so on; its classifier is
    not needed. Raises FileNotFoundError if the file is missing, ValueError if it does not hold a VGG-16.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, vgg16: str) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.stages, channels = nn.ModuleList(), 3
        for widths in WIDTHS:
            stage = nn.ModuleList()
            for width in widths:
                stage.append(nn.Conv2d(channels, width, 3, padding=1))
                channels = width
            self.stages.append(stage)
        self.heads = nn.ParameterList(load_file(HEADS)[f"lin{i}"] for i in range(len(WIDTHS)))
        self._load(Path(vgg16))
        self.requires_grad_(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        distance = torch.zeros(images.shape[0], device=images.device)
        features = zip(self._features(images), self._features(others), self.heads, strict=True)
        for one, other, head in features:
            squares = (_normalised(one) - _normalised(other)).square()
            distance = distance + (squares * head.view(-1, 1, 1)).sum(1).mean((1, 2))
        return distance

    def _features(self, images: Tensor) -> list[Tensor]:
        x = (images.expand(-1, 3, -1, -1) - self.shift) / self.scale
        features = []
        for i, stage in enumerate(self.stages):
            if i:
                x = F.max_pool2d(x, 2)
            assert isinstance(stage, nn.ModuleList)
            for conv in stage:
                x = F.relu(conv(x))
            features.append(x)
        return features

    def _load(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"loss.vgg16 must be a safetensors file of VGG-16, got {path}, which does not exist; see docs/vae.md"
            )
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"loss.vgg16 must be a safetensors file, got {path}: {error}") from error
        number = 0  # the layer's number in torchvision, which counts ReLUs and poolings too
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleList)
            for conv in stage:
                for name, weight in conv.named_parameters():
                    key = f"features.{number}.{name}"
                    if key not in tensors or tensors[key].shape != weight.shape:
                        found = list(tensors[key].shape) if key in tensors else "missing"
                        raise ValueError(
                            f"loss.vgg16: in {path}, {key} must be {list(weight.shape)} as in VGG-16, got {found}"
                        )
                    weight.data.copy_(tensors[key])
                number += 2
            number += 1


def _normalised(features: Tensor) -> Tensor:
    """Features [B, C, h, w] divided by their norm at each position, in float32: sums run over up to 512 squares."""
    features = features.float()
    # The gradient of the root at 0 is infinite. The epsilon inside it makes the gradient 0 where all features are 0.
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + 1e-10)
