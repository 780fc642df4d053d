"""A VGG-16 of random weights, for the perceptual loss."""

import pytest
import torch
from safetensors.torch import save_file

from lmfusion.vae.lpips import WIDTHS


@pytest.fixture(scope="session")
def vgg16(tmp_path_factory):
    """Path of a safetensors file with torchvision's names, and the same layers as torchvision lists them."""
    layers, channels = [], 3
    for widths in WIDTHS:
        for width in widths:
            layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU()]
            channels = width
        layers.append(torch.nn.MaxPool2d(2))
    features = torch.nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(0)
    for weight in features.parameters():
        fan_in = weight[0].numel() if weight.dim() > 1 else 100
        weight.data.normal_(std=(2 / fan_in) ** 0.5, generator=generator)
    path = tmp_path_factory.mktemp("vgg16") / "model.safetensors"
    save_file({f"features.{name}": weight for name, weight in features.state_dict().items()}, path)
    return path, features.requires_grad_(False)
