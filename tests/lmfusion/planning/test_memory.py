"""The calculated memory of a step equals what is measured: what autograd keeps, the peak, weights and states."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lmfusion.model.flops import SequenceCounts
from lmfusion.planning.memory import (
    Setup,
    activation_bytes,
    cast_bytes,
    checkpoint_bytes,
    memory_by_part,
    saved_bytes,
)
from lmfusion.planning.model_shape import CodecShape, ModelShape, count_parameters
from lmfusion.training.config import TrainConfig
from lmfusion.training.optimizer import Optimizer
from tests.lmfusion.training.models import SMOLLM2_LAYERS, UNET, make_batch, make_model

RECOMPUTE = ("none", "ffn", "layer")
STATES = ("frozen weights", "trained weights", "codec", "gradients", "optimizer", "EMA")


def setup_of(model, **options):
    return Setup(model.frozen_text, model.compute_dtype, model.recompute, device="cpu", **options)


def shape_of(model, batch, codec_parameters=0):
    return ModelShape(model.config, CodecShape(tuple(batch.latents.shape[1:]), codec_parameters))


def memory_of(model, batch, codec_parameters=0, **options):
    shape = shape_of(model, batch, codec_parameters)
    return memory_by_part(shape, SequenceCounts.of(batch), setup_of(model, **options))


def calculated(model, batch):
    """What autograd keeps of a micro-batch, with the weights that are cast for it."""
    shape, setup = shape_of(model, batch), setup_of(model)
    return sum(activation_bytes(shape, SequenceCounts.of(batch), setup).values()) + cast_bytes(shape, setup)


def measured(model, batch):
    """Bytes of the distinct storages that autograd keeps, without parameters and the layout's vectors."""
    return saved_bytes(lambda: model(batch=batch), [*model.parameters(), *batch.layout.vectors.values()])


def peak(model, batch):
    """Peak bytes that a forward and backward allocate, beyond what was allocated before."""
    model(batch=batch).loss.backward()  # allocates the gradients
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        model(batch=batch).loss.backward()
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("separation", ["deep", "shallow", "none"])
@pytest.mark.parametrize("frozen_text", [True, False], ids=["frozen", "trained"])
def test_activations_are_what_autograd_keeps(frozen_text, separation, recompute, dtype):
    model = make_model(frozen_text, recompute, dtype=dtype, separation=separation)
    batch = make_batch(model)
    assert calculated(model, batch) == pytest.approx(measured(model, batch), rel=0.02)


def test_activations_with_tied_embeddings():
    model = make_model(frozen_text=False, llm=SMOLLM2_LAYERS, dtype=torch.bfloat16)
    batch = make_batch(model)
    assert calculated(model, batch) == pytest.approx(measured(model, batch), rel=0.02)


@pytest.mark.parametrize("options", [{"patch_coder": UNET}, {"hidden_size": 32, "intermediate_size": 40}], ids=str)
def test_activations_of_a_unet_and_a_narrow_tower(options):
    model = make_model(**options)
    batch = make_batch(model)
    assert calculated(model, batch) == pytest.approx(measured(model, batch), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_peak_of_layers_of_real_size(recompute, dtype):
    model = make_model(recompute=recompute, llm=SMOLLM2_LAYERS, dtype=dtype)
    batch = make_batch(model, num_pairs=1, caption_tokens=40)
    parts = memory_of(model, batch)
    in_step = sum(size for name, size in parts.items() if name not in STATES)
    assert in_step == pytest.approx(peak(model, batch), rel=0.05)


def test_peak_with_a_trained_text_tower():
    model = make_model(frozen_text=False, llm=SMOLLM2_LAYERS)
    batch = make_batch(model, num_pairs=1, caption_tokens=40)
    parts = memory_of(model, batch)
    assert sum(size for name, size in parts.items() if name not in STATES) == pytest.approx(
        peak(model, batch), rel=0.05
    )


@pytest.mark.parametrize("frozen_text", [True, False], ids=["frozen", "trained"])
def test_states_are_what_is_allocated(frozen_text):
    model = make_model(frozen_text, dtype=torch.bfloat16 if frozen_text else torch.float32, patch_coder=UNET)
    batch = make_batch(model)
    model(batch=batch).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    parts = memory_of(model, batch)
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    assert parts.get("frozen weights", 0) + parts["trained weights"] == size(model.parameters())
    assert parts["gradients"] == parts["EMA"] == size(p.grad for p in trained)
    assert parts["optimizer"] == size(moments)


def test_eight_bit_states_are_what_is_allocated():
    pytest.importorskip("torchao.optim", reason="pip install torchao")
    model = make_model(llm=SMOLLM2_LAYERS, patch_coder=UNET)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    states = Optimizer(trained, TrainConfig(), "adamw_8bit").state_tensors()
    tables = 2 * sum(name.startswith("exp_avg.codes/") for name in states)  # of 256 float32 for each of two moments
    held = sum(state.rows.nbytes for name, state in states.items() if not name.startswith("step/")) + 1024 * tables
    assert memory_of(model, make_batch(model), optimizer="adamw_8bit")["optimizer"] == held


def test_ranks_divide_weights_and_states_and_gather_layers():
    model = make_model(dtype=torch.bfloat16)
    batch = make_batch(model)
    alone, shared = (memory_of(model, batch, codec_parameters=1000, num_ranks=n) for n in (1, 2))
    for part in ("frozen weights", "trained weights", "gradients", "optimizer", "EMA"):
        assert alone[part] / 2 <= shared[part] < 0.51 * alone[part]  # a dimension of odd length is divided unevenly
    assert shared["codec"] == alone["codec"] == 4000
    assert "weights cast" in alone and "weights cast" not in shared
    assert shared["gathered weights and gradients"] > 0 and "gathered weights and gradients" not in alone
    activations = [part for part in alone if part.startswith("activations")]
    assert activations and all(shared[part] == alone[part] for part in activations)


def test_without_averages_there_is_no_memory_for_them():
    model = make_model()
    batch = make_batch(model)
    assert "EMA" not in memory_of(model, batch, has_ema=False)
    shape = shape_of(model, batch)
    with_ema, without_ema = (checkpoint_bytes(shape, setup_of(model, has_ema=has_ema)) for has_ema in (True, False))
    assert with_ema - without_ema == 4 * count_parameters(shape.trained(frozen_text=True))
