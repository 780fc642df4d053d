"""Patch coders: tokens in raster order, time in both halves, long skips, sizes that fit."""

import pytest
import torch

from lmfusion.model.patch_coder import LinearPatchCoder, PatchCoderConfig, UNetPatchCoder, build_patch_coder

CONFIGS = [
    PatchCoderConfig("linear", patch_size=1),
    PatchCoderConfig("linear", patch_size=2),
    PatchCoderConfig("linear", patch_size=4),
    PatchCoderConfig("unet", patch_size=1, channels=(8,), num_blocks=1),
    PatchCoderConfig("unet", patch_size=2, channels=(8, 16), num_blocks=2),
    PatchCoderConfig("unet", patch_size=4, channels=(8, 16, 12), num_blocks=1),
]


def build(config, latent_channels=3, width=24):
    """A coder of which no weight is zero."""
    torch.manual_seed(0)
    coder = build_patch_coder(config, latent_channels, width)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return coder.double()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_shapes_and_gradients(config):
    coder = build(config)
    latents = torch.randn(2, 3, 8, 12, dtype=torch.float64, requires_grad=True)
    timesteps = torch.tensor([3, 700])
    tokens, skip = coder.encode(latents, timesteps)
    assert tokens.shape == (2 * coder.tokens_per_image(8, 12), 24) == (2 * 96 // config.patch_size**2, 24)
    prediction = coder.decode(tokens, timesteps, skip)
    assert prediction.shape == latents.shape
    prediction.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in coder.parameters())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_images_do_not_mix(config):
    coder = build(config)
    latents, timesteps = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 500, 999])
    tokens, skip = coder.encode(latents, timesteps)
    together = coder.decode(tokens, timesteps, skip)
    for i in range(3):
        one_tokens, one_skip = coder.encode(latents[i : i + 1], timesteps[i : i + 1])
        torch.testing.assert_close(tokens.view(3, -1, 24)[i], one_tokens)
        torch.testing.assert_close(together[i : i + 1], coder.decode(one_tokens, timesteps[i : i + 1], one_skip))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_rows_run_left_to_right_and_top_to_bottom(config):
    coder = build(config)
    size = config.patch_size
    latents = torch.randn(1, 3, 8 * size, 16 * size, dtype=torch.float64)
    changed = latents.clone()
    changed[:, :, 3 * size : 4 * size, 11 * size : 12 * size] += 1  # patch (3, 11) of 8 x 16
    timesteps = torch.tensor([10])
    difference = (coder.encode(changed, timesteps)[0] - coder.encode(latents, timesteps)[0]).square().sum(dim=1)
    weight = (difference / difference.sum()).view(8, 16)  # convolutions see the neighbours too
    assert (weight.sum(1) @ torch.arange(8.0).double()).item() == pytest.approx(3, abs=0.7)
    assert (weight.sum(0) @ torch.arange(16.0).double()).item() == pytest.approx(11, abs=0.7)
    if config.kind == "linear":
        assert (difference > 0).sum() == 1
        tokens = torch.zeros(128, 24, dtype=torch.float64)
        tokens[3 * 16 + 11] = 1
        _, skip = coder.encode(latents, timesteps)
        moved = (
            (coder.decode(tokens, timesteps, skip) - coder.decode(0 * tokens, timesteps, skip)).abs().sum(dim=(0, 1))
        )
        assert (moved != 0).equal((changed != latents)[0, 0])


def test_linear_patches_keep_channels_and_places():
    """With the identity in between, what goes in comes out."""
    coder = LinearPatchCoder(PatchCoderConfig("linear", patch_size=2), latent_channels=3, width=12).double()
    with torch.no_grad():
        for projection in (coder.in_proj, coder.out_proj):
            projection.weight.copy_(torch.eye(12))
            projection.bias.zero_()
        coder.time_embedder.mlp.linear_2.weight.zero_()
        coder.time_embedder.mlp.linear_2.bias.zero_()
    latents, timesteps = torch.randn(2, 3, 4, 6, dtype=torch.float64), torch.tensor([1, 2])
    tokens, skip = coder.encode(latents, timesteps)
    assert torch.equal(tokens[1], latents[0, :, :2, 2:4].flatten())
    assert torch.equal(coder.decode(tokens, timesteps, skip), latents)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_timestep_reaches_the_rows(config):
    coder = build(config)
    latents = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    early, late = (coder.encode(latents, torch.tensor([t]))[0] for t in (10, 900))
    assert (early - late).norm(dim=1).min() > 1e-3


def test_unet_uses_time_and_skip_on_the_way_up():
    coder = build(CONFIGS[4])
    tokens, skip = coder.encode(torch.randn(1, 3, 8, 8, dtype=torch.float64), torch.tensor([10]))
    base = coder.decode(tokens, torch.tensor([10]), skip)
    assert (base - coder.decode(tokens, torch.tensor([900]), skip)).abs().max() > 1e-3
    assert len(skip) == 4  # two levels of two blocks
    for i in range(len(skip)):
        without = tuple(0 * feature if i == j else feature for j, feature in enumerate(skip))
        assert (base - coder.decode(tokens, torch.tensor([10]), without)).abs().max() > 1e-3


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_fresh_coder_predicts_zero(config):
    coder = build_patch_coder(config, 3, 24)
    tokens, skip = coder.encode(torch.randn(1, 3, 8, 8), torch.tensor([10]))
    assert tokens.abs().max() > 0
    assert coder.decode(torch.randn_like(tokens), torch.tensor([10]), skip).abs().max() == 0


def test_computes_in_the_dtype_of_its_weights():
    coder = build(CONFIGS[4]).bfloat16()
    tokens, skip = coder.encode(torch.randn(1, 3, 8, 8), torch.tensor([10]))
    assert tokens.dtype == torch.bfloat16
    assert coder.decode(tokens.float(), torch.tensor([10]), skip).dtype == torch.bfloat16


def test_default_has_the_papers_size():
    with torch.device("meta"):
        coder = build_patch_coder(PatchCoderConfig(), latent_channels=8, width=4096)
    assert isinstance(coder, UNetPatchCoder)
    assert coder.tokens_per_image(32, 32) == 256
    assert 0.265e9 < sum(parameter.numel() for parameter in coder.parameters()) < 0.28e9


@pytest.mark.parametrize("size", [(7, 8), (8, 6), (0, 8), (2, 4)])
def test_sizes_that_do_not_divide_are_named(size):
    coder = build(PatchCoderConfig("linear", patch_size=4))
    with pytest.raises(ValueError, match=rf"multiples of the patch size 4, got {size[0]} x {size[1]}"):
        coder.tokens_per_image(*size)


def test_wrong_shapes_are_named():
    coder = build(CONFIGS[1])
    latents, timesteps = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"must have shape \[B, 3, h, w\]"):
        coder.encode(latents[:, :2], timesteps)
    with pytest.raises(ValueError, match=r"timesteps must have shape \[2\]"):
        coder.encode(latents, timesteps[:1])
    with pytest.raises(ValueError, match=r"7 x 8"):
        coder.encode(latents[:, :, :7], timesteps)
    tokens, skip = coder.encode(latents, timesteps)
    with pytest.raises(ValueError, match=r"tokens of . images .* must have shape"):
        coder.decode(tokens[:-1], timesteps, skip)
    with pytest.raises(ValueError, match=r"tokens of . images .* must have shape"):
        coder.decode(tokens[:16], timesteps[:1], skip)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "conv"}, "'conv'"),
        ({"patch_size": 0}, "patch_size must be .* got 0"),
        ({"patch_size": 4}, "patch_size of a unet of 2 levels must be 2, got 4"),
        ({"channels": ()}, "channels"),
        ({"num_blocks": 0}, "num_blocks 0"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        PatchCoderConfig(**settings)
