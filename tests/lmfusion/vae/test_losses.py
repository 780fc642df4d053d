"""The terms of an autoencoder's loss, compared with their definitions."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmfusion.vae import losses
from lmfusion.vae.discriminator import PatchDiscriminator, smallest_image
from lmfusion.vae.losses import Posterior
from lmfusion.vae.lpips import HEADS, LPIPS, SMALLEST_IMAGE


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(num, size, channels=3, seed=0):
    return random(num, channels, size, size, seed=seed).tanh()


def test_posterior_is_a_normal_distribution():
    moments = random(2, 6, 4, 4)
    posterior = Posterior.of(moments)
    normal = torch.distributions.Normal(moments[:, :3], (moments[:, 3:] / 2).exp())
    standard = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(posterior.kl(), torch.distributions.kl_divergence(normal, standard).mean())
    noise = random(2, 3, 4, 4, seed=1)
    torch.testing.assert_close(posterior.sample(noise), normal.mean + normal.stddev * noise)


def test_posterior_limits_its_variance():
    posterior = Posterior.of(torch.full((1, 2, 1, 1), 1e4))
    assert torch.isfinite(posterior.sample(torch.ones(1, 1, 1, 1))).all()
    assert torch.isfinite(posterior.kl())


def test_l1_and_psnr():
    x = torch.zeros(2, 3, 4, 4)
    y = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 7.0)])
    torch.testing.assert_close(losses.l1(y, x), torch.tensor(3.6))
    # Errors of 0.2 and, clamped at 1, of 1, where the peak is 2
    torch.testing.assert_close(losses.psnr(y, x), torch.tensor([20.0, 20 * torch.tensor(2.0).log10().item()]))


def test_hinge_losses():
    assert losses.discriminator_loss(torch.zeros(2, 1, 3, 3), torch.zeros(2, 1, 3, 3)) == 1
    assert losses.discriminator_loss(torch.full((1,), 1.5), torch.full((1,), -1.5)) == 0
    assert losses.discriminator_loss(torch.full((1,), -1.0), torch.full((1,), 1.0)) == 2
    assert losses.generator_loss(torch.tensor([1.0, 3.0])) == -2


def test_adaptive_weight_balances_gradients():
    layer = torch.tensor([1.0, 2.0], requires_grad=True)
    reconstruction, gan = 6 * layer.sum(), 0.5 * layer.sum()
    weight = losses.adaptive_gan_weight(reconstruction, gan, layer)
    assert weight == pytest.approx(12, rel=1e-3)
    assert not weight.requires_grad
    (reconstruction + weight * gan).backward()  # both graphs are kept
    torch.testing.assert_close(layer.grad, torch.full((2,), 12.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_discriminator_scores_depend_only_on_their_image(num_layers):
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(3, 8, num_layers)
    size = smallest_image(num_layers)
    assert discriminator(images(2, size)).shape == (2, 1, 1, 1)
    assert sum(conv.stride == (2, 2) for conv in discriminator.layers if hasattr(conv, "stride")) == num_layers
    with pytest.raises(RuntimeError):
        discriminator(images(1, size - 2**num_layers))
    two = discriminator(images(2, 2 * size))
    torch.testing.assert_close(discriminator(images(2, 2 * size)[:1]), two[:1])


def published_lpips(features, one, other):
    """LPIPS 0.1 as its authors' code computes it, step by step, from torchvision's list of layers."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    heads, ends, distance = load_file(HEADS), (4, 9, 16, 23, 30), 0
    x, y = (one - shift) / scale, (other - shift) / scale
    for i, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
        x, y = features[start:end](x), features[start:end](y)
        unit_x, unit_y = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y))
        difference = (unit_x - unit_y).square()
        head = heads[f"lin{i}"].view(1, -1, 1, 1)
        distance = distance + torch.nn.functional.conv2d(difference, head).mean((1, 2, 3))
    return distance


def test_lpips_is_the_published_distance(vgg16):
    path, features = vgg16
    lpips = LPIPS(str(path))
    one, other = images(2, 32), images(2, 32, seed=1)
    torch.testing.assert_close(lpips(one, other), published_lpips(features, one, other))
    assert (lpips(one, one) == 0).all()
    nearer = lpips(one, one + 0.1 * (other - one))
    assert (nearer > 0).all() and (nearer < lpips(one, other)).all()


def test_lpips_of_grey_and_of_the_smallest_images(vgg16):
    lpips = LPIPS(str(vgg16[0]))
    one, other = images(2, SMALLEST_IMAGE, 1), images(2, SMALLEST_IMAGE, 1, seed=1)
    distance = lpips(one, other)
    torch.testing.assert_close(distance, lpips(one.repeat(1, 3, 1, 1), other.repeat(1, 3, 1, 1)))
    assert torch.isfinite(distance).all()


def test_lpips_passes_finite_gradients_only_to_images(vgg16):
    lpips = LPIPS(str(vgg16[0]))
    one = images(1, 16).requires_grad_()
    lpips(one, images(1, 16, seed=1)).sum().backward()
    assert torch.isfinite(one.grad).all() and one.grad.abs().max() > 0
    assert not any(weight.requires_grad for weight in lpips.parameters())


def test_lpips_refuses_other_files_than_vgg16(tmp_path, vgg16):
    with pytest.raises(
        FileNotFoundError, match=r"loss\.vgg16 must be a safetensors file of VGG-16, got .*docs/vae\.md"
    ):
        LPIPS(str(tmp_path / "none"))
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match=r"loss.vgg16 must be a safetensors file, got"):
        LPIPS(str(tmp_path / "text"))
    tensors = load_file(vgg16[0])
    save_file({"features.0.weight": tensors["features.0.weight"]}, tmp_path / "one")
    with pytest.raises(ValueError, match=r"features\.0\.bias must be \[64\] as in VGG-16, got missing"):
        LPIPS(str(tmp_path / "one"))
    save_file({"features.0.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"features\.0\.weight must be \[64, 3, 3, 3\] as in VGG-16, got \[64, 3, 7, 7\]"
    ):
        LPIPS(str(tmp_path / "other"))
