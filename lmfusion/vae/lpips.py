"""How different do two images look? LPIPS (Zhang et al., 2018): distances between the features of a VGG-16.

The VGG-16 (ImageNet classifier, 0.5 GB) is read from a local safetensors file. The weights of its features in the sum,
1,472 numbers fitted to human judgement, come with this package.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG-16's convolutions; the features compared are those at the end of each stage."""
SMALLEST_IMAGE = 2 ** (len(WIDTHS) - 1)
"""Pixels a side: stages after the first begin by halving them."""

HEADS = Path(__file__).with_name("lpips_heads.safetensors")


class LPIPS(nn.Module):
    """Distance [B] between images [B, 1 | 3, H, W] in [-1, 1], 0 for equal ones. Frozen; gradients pass to the images.

    `vgg16` is a safetensors file with the names of torchvision and timm, `features.0.weight` and so on; its classifier
    is not needed. Raises FileNotFoundError where it is missing, ValueError where it is no VGG-16.
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
                f"loss.vgg16: there is no file {path}; it is a safetensors file of VGG-16, see docs/vae.md"
            )
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"loss.vgg16: {path} is no safetensors file: {error}") from error
        number = 0  # of the layer in torchvision's list, where ReLUs and poolings count too
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleList)
            for conv in stage:
                for name, weight in conv.named_parameters():
                    key = f"features.{number}.{name}"
                    if key not in tensors or tensors[key].shape != weight.shape:
                        found = list(tensors[key].shape) if key in tensors else "missing"
                        raise ValueError(
                            f"loss.vgg16: {path} is no VGG-16: {key} is {found}, it must be {list(weight.shape)}"
                        )
                    weight.data.copy_(tensors[key])
                number += 2
            number += 1


def _normalised(features: Tensor) -> Tensor:
    """Features [B, C, h, w] divided by their length at each place, in float32: the sums are over up to 512 squares."""
    features = features.float()
    # The root's gradient at 0 is infinite; a place where all features are 0 shall have none
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + 1e-10)
