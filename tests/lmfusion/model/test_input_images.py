"""Input images of the image tower: visible to all that follows, without noise and without a loss of their own."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lmfusion.data.pipeline.documents import edit_document
from lmfusion.model.batch import SpecialTokens, pack
from lmfusion.model.modeling import LMFusion

NUM_IMAGE_TOKENS = 4
KINDS = {"linear": {"kind": "linear"}, "unet": {"kind": "unet", "channels": (8, 16), "num_blocks": 1}}


def build(folder, patch_coder="linear"):
    model = LMFusion.from_llm(
        folder,
        image={"hidden_size": 16, "patch_coder": KINDS[patch_coder]},
        codec={"kind": "pixels", "channels": 1, "image_size": 4},
        diffusion={"prediction_type": "v_prediction"},
        dtype=torch.float64,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.image.parameters():  # what training starts at zero matters, too
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def tokens_of(model):
    return SpecialTokens.of(model.tokenizer, model.boi_token_id)


def make_batch(model, instructions=((5, 6, 7), (8, 9)), frozen_text=True):
    """Edits, each with its source and its target, in this order."""
    documents = [edit_document(words, NUM_IMAGE_TOKENS, tokens_of(model)) for words in instructions]
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 2 * len(documents), 1, 4, 4, generator=generator, dtype=torch.float64)
    timesteps = torch.tensor([900, 300, 100, 700])[: 2 * len(documents)]
    return pack(documents, latents, noise, timesteps, frozen_text=frozen_text)


@pytest.mark.parametrize("frozen_text", [True, False])
@pytest.mark.parametrize("patch_coder", KINDS)
def test_the_loss_of_edits_is_that_of_their_targets(tiny_llama, patch_coder, frozen_text):
    model = build(tiny_llama, patch_coder)
    model.freeze_text(frozen_text)
    batch = make_batch(model, frozen_text=frozen_text)
    output = model(batch=batch)

    share = model.diffusion.alphas_cumprod[[300, 700]].sqrt().view(-1, 1, 1, 1)
    rest = (1 - share**2).sqrt()
    noisy = batch.latents.clone()
    noisy[1::2] = share * batch.latents[1::2] + rest * batch.noise[1::2]
    velocity = share * batch.noise[1::2] - rest * batch.latents[1::2]
    timesteps = torch.tensor([0, 300, 0, 700])
    x_image, skip = model.encode_images(noisy, timesteps)
    h_text, h_image = model.run_layers(model.embed(batch.token_ids), x_image, batch.layout)
    errors = (model.decode_images(h_image, timesteps, skip)[1::2] - velocity).square().mean((1, 2, 3))
    torch.testing.assert_close(output.diffusion_loss_sum, errors.sum(), rtol=1e-9, atol=0)

    live = h_text[batch.layout.num_constant :]
    losses = F.cross_entropy(model.text_logits(live), batch.labels, ignore_index=-100, reduction="none")
    eos, boi = model.tokenizer.eos_token_id, model.boi_token_id
    assert sorted(batch.labels[batch.labels >= 0].tolist()) == sorted([eos, boi, eos, boi])
    assert (output.num_target_images, output.num_labels, output.num_boi_targets) == (2, 4, 0)
    assert output.lm_loss_sum.item() == pytest.approx(losses.sum().item(), rel=1e-6)  # added up in float32
    assert output.loss.item() == pytest.approx((losses.sum() / 4 + 5 * errors.mean()).item(), rel=1e-6)


def test_noise_and_timestep_of_a_given_image_are_not_looked_at(tiny_llama):
    model = build(tiny_llama)
    batch = make_batch(model)
    assert batch.timesteps.tolist() == [0, 300, 0, 700] and batch.target_image_indices.tolist() == [1, 3]
    other = replace(batch, noise=batch.noise.clone().index_fill(0, torch.tensor([0, 2]), float("nan")))
    assert torch.equal(model(batch=other).loss, model(batch=batch).loss)


def test_gradient_reaches_the_tower_through_the_given_image(tiny_llama):
    model = build(tiny_llama)
    batch = make_batch(model, instructions=((5, 6, 7),))
    latents = batch.latents.clone().requires_grad_()
    [gradient] = torch.autograd.grad(model(batch=replace(batch, latents=latents)).diffusion_loss_sum, latents)
    assert gradient[0].abs().min() > 0  # all of the source matters to the target

    # The same noisy target whatever the source: where gradients differ, the tower learned from the source
    words = [name for name, _ in model.image.named_parameters() if name.startswith("layers.0.self_attn.qkv")]
    gradients = []
    for scale in (1.0, 2.0):
        scaled = batch.latents.clone()
        scaled[0] *= scale
        model.zero_grad()
        model(batch=replace(batch, latents=scaled)).diffusion_loss_sum.backward()
        gradients.append([dict(model.image.named_parameters())[name].grad.clone() for name in words])
    assert words and all(not torch.allclose(a, b) for a, b in zip(*gradients, strict=True))
    assert all(p.grad is None for p in model.text.parameters())


def test_a_given_image_does_not_see_what_comes_after_it(tiny_llama):
    model = build(tiny_llama)
    batch = make_batch(model, instructions=((5, 6, 7),))
    changed = replace(batch, noise=batch.noise + 1, latents=batch.latents.clone())
    changed.latents[1] += 1
    tokens = []
    for one in (batch, changed):
        noisy = one.latents.clone()
        noisy[1] += one.noise[1]
        x_image, _ = model.encode_images(noisy, one.timesteps)
        tokens.append(model.run_layers(model.embed(one.token_ids), x_image, one.layout)[1])
    assert torch.equal(tokens[0][:NUM_IMAGE_TOKENS], tokens[1][:NUM_IMAGE_TOKENS])
    assert not torch.allclose(tokens[0][NUM_IMAGE_TOKENS:], tokens[1][NUM_IMAGE_TOKENS:])
