"""Codecs: frozen, deterministic, scaled by their config, and loaded only if undamaged and unchanged."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from lmfusion.model.codec import WEIGHTS_NAME, CodecConfig, load_codec


def save_autoencoder(folder, kind, latent_channels=4, **settings):
    """A random autoencoder that halves the sides once."""
    torch.manual_seed(0)
    if kind == "autoencoder_tiny":
        model = AutoencoderTiny(
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=latent_channels,
            **settings,
        )
    else:
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            norm_num_groups=2,
            latent_channels=latent_channels,
            **settings,
        )
    model.save_pretrained(folder)
    return model.eval()


def images(num=2, channels=3, size=8):
    return torch.rand(num, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_their_own_latents(channels):
    codec = load_codec(CodecConfig("pixels", channels=channels, image_size=8))
    assert (codec.latent_channels, codec.latent_size, codec.latent_range) == (channels, 8, 1.0)
    x = images(channels=channels)
    assert torch.equal(codec.encode(x), x)
    assert torch.equal(codec.decode(3 * x), (3 * x).clamp(-1, 1))
    assert not list(codec.parameters())


@pytest.mark.parametrize("kind", ["autoencoder_kl", "autoencoder_tiny"])
@pytest.mark.parametrize("latent_channels", [4, 16])
def test_autoencoders_are_scaled_as_their_config_says(tmp_path, kind, latent_channels):
    model = save_autoencoder(tmp_path, kind, latent_channels, scaling_factor=0.25, shift_factor=0.5)
    config = CodecConfig(kind, path=str(tmp_path), image_size=8)
    codec = load_codec(config)
    assert (codec.latent_channels, codec.latent_size, codec.downscale) == (latent_channels, 4, 2)
    x = images()
    with torch.no_grad():
        encoded = model.encode(x).latents if kind == "autoencoder_tiny" else model.encode(x).latent_dist.mode()
        decoded = model.decode(encoded).sample.clamp(-1, 1)
    latents = codec.encode(x)
    torch.testing.assert_close(latents, (encoded - 0.5) * 0.25)
    assert torch.equal(latents, codec.encode(x))  # deterministic
    torch.testing.assert_close(codec.decode(latents), decoded)


@pytest.mark.parametrize(
    "settings",
    [{"scaling_factor": 0.25, "shift_factor": 0.5}, {"latents_mean": [1.0] * 4, "latents_std": [2.0, 1, 4, 1]}],
)
def test_moments_are_those_of_the_posterior_scaled(tmp_path, settings):
    model = save_autoencoder(tmp_path, "autoencoder_kl", **settings)
    codec = load_codec(CodecConfig("autoencoder_kl", path=str(tmp_path), image_size=8))
    mean, std = codec.moments(images())
    assert codec.has_posterior and torch.equal(mean, codec.encode(images()))
    with torch.no_grad():
        posterior = model.encode(images()).latent_dist
    scale = settings.get("scaling_factor", model.config.scaling_factor)
    scale = scale / torch.tensor(settings.get("latents_std", [1.0] * 4)).view(4, 1, 1)
    shift = torch.tensor(settings.get("latents_mean", [settings.get("shift_factor", 0.0)] * 4)).view(4, 1, 1)
    torch.testing.assert_close(std, posterior.std * scale)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    drawn = (posterior.mean + posterior.std * noise - shift) * scale
    torch.testing.assert_close(mean + std * noise, drawn)


def test_codecs_without_posterior_have_no_deviation(tmp_path):
    save_autoencoder(tmp_path, "autoencoder_tiny")
    for config in (CodecConfig(image_size=8), CodecConfig("autoencoder_tiny", path=str(tmp_path), image_size=8)):
        codec = load_codec(config)
        mean, std = codec.moments(images())
        assert not codec.has_posterior and std is None and torch.equal(mean, codec.encode(images()))


def test_identity_tells_what_latents_depend_on(tmp_path):
    for name, settings in (("one", {}), ("copy", {}), ("scaled", {"scaling_factor": 0.5})):
        save_autoencoder(tmp_path / name, "autoencoder_kl", **settings)

    def identity(name, **fields):
        return load_codec(
            CodecConfig("autoencoder_kl", path=str(tmp_path / name), **{"image_size": 8, **fields})
        ).identity()

    assert identity("one") == identity("copy")  # wherever it lies
    assert identity("one") == json.loads(json.dumps(identity("one")))
    assert identity("one")["weights_sha256"] == identity("scaled")["weights_sha256"]
    assert identity("one") != identity("scaled")
    assert identity("one") != identity("one", image_size=16)


def test_statistics_per_channel(tmp_path):
    model = save_autoencoder(
        tmp_path, "autoencoder_kl", latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[2.0] * 4, scaling_factor=1.0
    )
    codec = load_codec(CodecConfig("autoencoder_kl", path=str(tmp_path), image_size=8))
    with torch.no_grad():
        encoded = model.encode(images()).latent_dist.mode()
    latents = codec.encode(images())
    torch.testing.assert_close(latents, (encoded - torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)) / 2)
    with torch.no_grad():
        torch.testing.assert_close(codec.decode(latents), model.decode(encoded).sample.clamp(-1, 1))


def test_autoencoder_is_frozen_and_answers_in_the_dtype_given(tmp_path):
    save_autoencoder(tmp_path, "autoencoder_tiny")
    codec = load_codec(CodecConfig("autoencoder_tiny", path=str(tmp_path), image_size=8)).bfloat16()
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    x = images().requires_grad_()
    latents = codec.encode(x)
    assert latents.dtype == torch.float32 and not latents.requires_grad
    assert not codec.decode(latents).requires_grad


def test_digest_is_kept_and_checked(tmp_path):
    save_autoencoder(tmp_path, "autoencoder_tiny")
    config = CodecConfig("autoencoder_tiny", path=str(tmp_path), image_size=8)
    load_codec(config)
    assert config.sha256 is not None and len(config.sha256) == 64
    load_codec(config)
    weights = tmp_path / WEIGHTS_NAME
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"must have the sha256 .* that this model was made with"):
        load_codec(config)


def test_damaged_and_missing_weights_are_named(tmp_path):
    config = CodecConfig("autoencoder_tiny", path=str(tmp_path / "none"), image_size=8)
    with pytest.raises(FileNotFoundError, match=WEIGHTS_NAME):
        load_codec(config)
    save_autoencoder(tmp_path, "autoencoder_tiny")
    weights = tmp_path / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot load the autoencoder"):
        load_codec(CodecConfig("autoencoder_tiny", path=str(tmp_path), image_size=8))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny", "latent_channels": 7}))
    with pytest.raises(ValueError, match=r"cannot load the autoencoder"):
        load_codec(CodecConfig("autoencoder_tiny", path=str(tmp_path), image_size=8))


def test_wrong_images_and_latents_are_named(tmp_path):
    save_autoencoder(tmp_path, "autoencoder_tiny")
    codec = load_codec(CodecConfig("autoencoder_tiny", path=str(tmp_path), image_size=8))
    with pytest.raises(ValueError, match=r"must have shape \[B, 3, H, W\]"):
        codec.encode(images(channels=1))
    with pytest.raises(ValueError, match=r"multiples of 2 pixels, got 7 x 7"):
        codec.encode(images(size=7))
    with pytest.raises(ValueError, match=r"must have shape \[B, 4, h, w\]"):
        codec.decode(torch.zeros(1, 3, 4, 4))


def test_autoencoder_that_does_not_fit_is_named(tmp_path):
    save_autoencoder(tmp_path, "autoencoder_tiny")
    for settings, message in (
        ({"channels": 1, "image_size": 8}, "codec.channels must be 3"),
        ({"image_size": 9}, "must be a multiple of 2 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            load_codec(CodecConfig("autoencoder_tiny", path=str(tmp_path), **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "vqgan"}, "'vqgan'"),
        ({"kind": "autoencoder_kl"}, "needs a path"),
        ({"path": "x"}, "has no weights"),
        ({"channels": 4}, "must be 1 .* got 4"),
        ({"image_size": 0}, "image_size must be .* got 0"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        CodecConfig(**settings)


def test_another_kind_of_autoencoder_is_named(tmp_path):
    save_autoencoder(tmp_path, "autoencoder_kl")
    with pytest.raises(ValueError, match=r"must hold an AutoencoderTiny .* got 'AutoencoderKL'"):
        load_codec(CodecConfig("autoencoder_tiny", path=str(tmp_path), image_size=8))
