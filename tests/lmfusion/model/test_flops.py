"""FLOPs of a step equal those that torch counts, whatever is frozen, shared or recomputed."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lmfusion.model.batch import Document, SpecialTokens, pack
from lmfusion.model.flops import SequenceCounts, batch_flops, flops_by_part, matmul_rate
from tests.lmfusion.training.models import LINEAR, SMOLLM2_LAYERS, UNET, make_batch, make_model

SEPARATIONS = ("deep", "shallow", "none")
RECOMPUTE = ("none", "ffn", "layer")


def counted(model, batch):
    with FlopCounterMode(display=False) as counter:
        model(batch=batch).loss.backward()
    return counter.get_total_flops()


def total(model, batch):
    parts = flops_by_part(
        model.config, SequenceCounts.of(batch), frozen_text=model.frozen_text, recompute=model.recompute
    )
    return sum(part.total for part in parts.values())


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("separation", SEPARATIONS)
@pytest.mark.parametrize("frozen_text", [True, False], ids=["frozen", "trained"])
def test_counts_as_torch_does(frozen_text, separation, recompute):
    model = make_model(frozen_text, separation=separation, recompute=recompute)
    batch = make_batch(model)
    assert total(model, batch) == pytest.approx(counted(model, batch), rel=1e-3)


@pytest.mark.parametrize("options", [{"patch_coder": UNET}, {"hidden_size": 32, "intermediate_size": 40}], ids=str)
def test_counts_a_unet_and_a_narrow_tower(options):
    model = make_model(**options)
    batch = make_batch(model)
    assert total(model, batch) == pytest.approx(counted(model, batch), rel=1e-3)


def make_edits(model, num_edits):
    """An input image, an instruction and a target image; and an input image with a caption."""
    tokens = SpecialTokens(model.boi_token_id, model.eoi_token_id, bos_token_id=1, eos_token_id=2)
    num_image, instruction = model.tokens_per_image, list(range(5, 14))

    def with_input():
        return Document().text([1]).marker(tokens.boi_token_id).image(num_image, is_input=True)

    edit = with_input().marker(tokens.eoi_token_id).text(instruction).marker(tokens.boi_token_id).image(num_image)
    edit = edit.marker(tokens.eoi_token_id).end(tokens.eos_token_id)
    caption = with_input().marker(tokens.eoi_token_id).text(instruction).end(tokens.eos_token_id)
    documents = [edit] * num_edits + [caption]
    size = model.codec.latent_size
    latents = torch.randn(2 * num_edits + 1, model.codec.latent_channels, size, size)
    timesteps = torch.randint(0, 1000, latents.shape[:1])
    return pack(documents, latents, torch.randn_like(latents), timesteps, frozen_text=model.frozen_text)


@pytest.mark.parametrize("num_edits", [2, 0])
@pytest.mark.parametrize("patch_coder", [LINEAR, UNET], ids=["linear", "unet"])
def test_counts_input_images(patch_coder, num_edits):
    model = make_model(patch_coder=patch_coder)
    batch = make_edits(model, num_edits)
    assert (batch.num_images, batch.num_target_images) == (2 * num_edits + 1, num_edits)
    assert total(model, batch) == pytest.approx(counted(model, batch), rel=1e-3)
    counts = SequenceCounts.of(batch)
    all_targets = replace(counts, num_target_images=counts.num_images)
    mixed, expected = (flops_by_part(model.config, c, frozen_text=True)["patch coder"] for c in (counts, all_targets))
    assert mixed.total < 0.9 * expected.total


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_counts_layers_of_real_size(recompute):
    model = make_model(recompute=recompute, llm=SMOLLM2_LAYERS, dtype=torch.bfloat16)
    batch = make_batch(model, caption_tokens=24)
    assert total(model, batch) == pytest.approx(counted(model, batch), rel=1e-2)


def test_a_batch_does_not_count_recomputed_operations():
    model = make_model(recompute="layer")
    batch = make_batch(model)
    assert isinstance(batch_flops(model.config, batch, frozen_text=True), int)
    parts = flops_by_part(model.config, SequenceCounts.of(batch), frozen_text=True, recompute="layer")
    recomputed = sum(part.recomputed for part in parts.values())
    assert recomputed > 0
    assert batch_flops(model.config, batch, frozen_text=True) == pytest.approx(total(model, batch) - recomputed)


def test_constant_text_costs_a_forward_and_live_text_no_weight_gradients():
    model = make_model()
    counts = SequenceCounts.of(make_batch(model))
    parts = flops_by_part(model.config, counts, frozen_text=True)
    constant, live, image = (parts[name] for name in ("constant text", "live text", "image tokens"))
    assert constant.backward == 0
    assert live.backward == live.forward
    assert image.backward == 2 * image.forward
    trained = flops_by_part(model.config, counts, frozen_text=False)
    assert trained["live text"].backward == 2 * live.forward


def test_a_batch_without_images_or_labels_is_counted():
    model = make_model()
    batch = make_batch(model, num_pairs=0)
    assert batch_flops(model.config, batch, frozen_text=True) == 0


def test_the_rate_of_matrix_products_is_measured_once(monkeypatch):
    matmul_rate.cache_clear()
    monkeypatch.setattr("lmfusion.model.flops.CPU_MATMUL_SIZE", 96)
    rate = matmul_rate(torch.device("cpu"), torch.float32)
    assert 1e7 < rate < 1e14
    assert matmul_rate(torch.device("cpu"), torch.float32) == rate
    matmul_rate.cache_clear()
