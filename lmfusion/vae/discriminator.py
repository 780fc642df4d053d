"""PatchGAN, the discriminator that makes reconstructions sharp where the L1 loss alone would blur them."""

from torch import Tensor, nn

_MAX_WIDENING = 8
"""Each layer is twice as wide as the one before, up to this multiple of the first."""


class PatchDiscriminator(nn.Module):
    """Maps images [B, channels, H, W] in [-1, 1] to a score for each overlapping patch, [B, 1, h, w]: high for real.

    It has `num_layers` convolutions of stride 2, then two of stride 1; three layers judge patches of 70 x 70 pixels
    (Isola et al., 2017). GroupNorm replaces the original's BatchNorm, so that a score depends only on its own image and
    there are no running averages to resume.
    """

    def __init__(self, channels: int, width: int, num_layers: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        widths = [width * min(2**i, _MAX_WIDENING) for i in range(num_layers + 1)]
        for i in range(num_layers):
            stride = 2 if i < num_layers - 1 else 1
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(min(32, width), widths[i + 1]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def smallest_image(num_layers: int) -> int:
    """Pixels per side of the smallest image that a discriminator with `num_layers` can judge."""
    return 2**num_layers * 3
