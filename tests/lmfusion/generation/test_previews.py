"""Previews: the linear map from latents to colours fits the codec, and is made once."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from lmfusion.generation import previews
from lmfusion.generation.previews import preview_image, preview_map, to_rgb
from lmfusion.images.preprocessing import to_pil
from lmfusion.model.codec import Codec, CodecConfig, load_codec


def smooth_images(num, seed, size=16, channels=3):
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.rand(num, channels, 4, 4, generator=generator), (size, size), mode="bilinear") * 2 - 1


class LinearCodec(Codec):
    """Latents that mix the colours of 4 x 4 pixels: a codec for which a perfect map exists."""

    def __init__(self, channels=3):
        super().__init__()
        self.config = CodecConfig("autoencoder_kl", path="nowhere", channels=channels, image_size=16)
        self.latent_channels, self.downscale, self.latent_range, self.has_posterior = 5, 4, 5.0, False
        self.mix = torch.randn(channels + 1, 5, generator=torch.Generator().manual_seed(0))
        self.num_images = 0

    def _moments(self, images):
        self.num_images += len(images)
        pooled = F.avg_pool2d(images, 4)
        return torch.einsum("bchw,cd->bdhw", torch.cat([pooled, torch.ones_like(pooled[:, :1])], 1), self.mix), None

    def _decode(self, latents):
        raise AssertionError("a preview is not decoded")


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """Folder of a small AutoencoderKL whose encoder has learned to mix colours, nearly linearly."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            norm_num_groups=2,
        )
    mix = torch.tensor([[1, 0.5, -1, 0], [0, 1, 0.5, 1], [-0.5, 0.2, 1, 1]])
    optimizer = torch.optim.Adam(model.encoder.parameters(), lr=5e-3)
    for step in range(120):
        images = smooth_images(16, seed=step)
        target = torch.einsum("bchw,cd->bdhw", F.avg_pool2d(images, 2), mix)
        loss = (model.encode(images).latent_dist.mode() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("autoencoder")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_shown_as_they_are(channels):
    codec = load_codec(CodecConfig("pixels", channels=channels, image_size=8))
    latents = smooth_images(2, seed=0, size=8, channels=channels) * 1.2  # some beyond [-1, 1]
    rgb = to_rgb(latents, preview_map(codec))
    assert rgb.dtype == torch.uint8 and rgb.shape == (2, 8, 8, 3)
    for colours, finished in zip(rgb, to_pil(codec.decode(latents)), strict=True):
        preview = preview_image(colours, 8)
        assert preview.size == finished.size and preview.mode == "RGB"
        difference = np.abs(np.asarray(preview).astype(int) - np.asarray(finished.convert("RGB")).astype(int))
        assert difference.max() <= 1  # halves are rounded in another order


@pytest.mark.parametrize("channels", [1, 3])
def test_the_map_of_a_linear_codec_is_found(channels):
    codec = LinearCodec(channels)
    images = smooth_images(4, seed=1, channels=channels)
    fitted = preview_map(codec)
    assert fitted.shape == (6, 3) and fitted.dtype == torch.float32
    latents = codec.encode(images)
    rgb = latents.permute(0, 2, 3, 1) @ fitted[:-1] + fitted[-1]
    expected = (F.avg_pool2d((images + 1) / 2, 4).permute(0, 2, 3, 1)).expand(-1, -1, -1, 3)
    torch.testing.assert_close(rgb, expected, atol=1e-4, rtol=0)
    assert (to_rgb(latents, fitted) - expected * 255).abs().max() <= 0.6


def test_an_autoencoder_is_read_as_well_as_it_is_linear(autoencoder):
    codec = load_codec(CodecConfig("autoencoder_kl", path=str(autoencoder), image_size=16))
    images = smooth_images(16, seed=1000)
    rgb = to_rgb(codec.encode(images), preview_map(codec)).float() / 255
    expected = F.avg_pool2d((images + 1) / 2, 2).permute(0, 2, 3, 1)
    assert (rgb - expected).square().mean().sqrt() < 0.65 * expected.std()


def test_a_map_is_fitted_once_for_each_codec_and_always_the_same(autoencoder):
    config = CodecConfig("autoencoder_kl", path=str(autoencoder), image_size=16)
    state = torch.random.get_rng_state()
    codec, again = load_codec(config), load_codec(config).bfloat16()
    one, other = preview_map(codec), preview_map(load_codec(config))
    assert preview_map(codec) is one and torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(preview_map(again), one, atol=0.05, rtol=0.1)
    assert "_preview_map" not in codec.state_dict()

    linear = LinearCodec()
    for _ in range(3):
        preview_map(linear)
    assert linear.num_images == previews.NUM_IMAGES


def test_previews_have_the_size_of_the_finished_image():
    rgb = torch.zeros(4, 4, 3, dtype=torch.uint8)
    rgb[:, 2:] = 200
    image = preview_image(rgb, 32)
    assert image.size == (32, 32) and image.mode == "RGB"
    row = np.asarray(image)[16, :, 0].astype(int)
    assert row[0] == 0 and row[-1] == 200 and (np.diff(row) >= 0).all()
    assert len(set(row.tolist())) > 4  # a smooth edge, no staircase


def test_images_of_a_batch_have_their_own_previews():
    fitted = preview_map(LinearCodec())
    latents = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    together = to_rgb(latents, fitted)
    for i in range(3):
        assert torch.equal(to_rgb(latents[i : i + 1], fitted)[0], together[i])
