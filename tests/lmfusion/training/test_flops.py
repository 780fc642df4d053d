"""Are the operations of a step counted as torch counts them, whatever is frozen, shared or computed again?"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lmfusion.training.flops import RowCounts, batch_flops, flops_by_part, matmul_rate
from tests.lmfusion.training.models import SMOLLM2_LAYERS, UNET, make_batch, make_model

SEPARATIONS = ("deep", "shallow", "none")
RECOMPUTE = ("none", "ffn", "layer")


def counted(model, batch):
    with FlopCounterMode(display=False) as counter:
        model(batch=batch).loss.backward()
    return counter.get_total_flops()


def total(model, batch):
    parts = flops_by_part(model.config, RowCounts.of(batch), frozen_text=model.frozen_text, recompute=model.recompute)
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


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_counts_layers_of_real_size(recompute):
    model = make_model(recompute=recompute, llm=SMOLLM2_LAYERS, dtype=torch.bfloat16)
    batch = make_batch(model, caption_tokens=24)
    assert total(model, batch) == pytest.approx(counted(model, batch), rel=1e-2)


def test_a_batch_counts_what_is_not_done_again():
    model = make_model(recompute="layer")
    batch = make_batch(model)
    assert isinstance(batch_flops(model.config, batch, frozen_text=True), int)
    parts = flops_by_part(model.config, RowCounts.of(batch), frozen_text=True, recompute="layer")
    again = sum(part.again for part in parts.values())
    assert again > 0
    assert batch_flops(model.config, batch, frozen_text=True) == pytest.approx(total(model, batch) - again)


def test_constant_text_costs_a_forward_and_live_text_no_weight_gradients():
    model = make_model()
    rows = RowCounts.of(make_batch(model))
    parts = flops_by_part(model.config, rows, frozen_text=True)
    constant, live, image = (parts[name] for name in ("constant text", "live text", "image tokens"))
    assert constant.backward == 0
    assert live.backward == live.forward
    assert image.backward == 2 * image.forward
    trained = flops_by_part(model.config, rows, frozen_text=False)
    assert trained["live text"].backward == 2 * live.forward


def test_a_batch_without_images_or_labels_is_counted():
    model = make_model()
    batch = make_batch(model, num_pairs=0)
    assert batch_flops(model.config, batch, frozen_text=True) == 0


def test_the_rate_of_matrix_products_is_measured_once(monkeypatch):
    matmul_rate.cache_clear()
    monkeypatch.setattr("lmfusion.training.flops.CPU_MATMUL_SIZE", 96)
    rate = matmul_rate(torch.device("cpu"), torch.float32)
    assert 1e7 < rate < 1e14
    assert matmul_rate(torch.device("cpu"), torch.float32) == rate
    matmul_rate.cache_clear()
