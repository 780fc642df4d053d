"""The FLOPs of a training step in docs/planning.md are those that are counted, as torch counts them."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lmfusion_kernels as lk
from benchmarks import training_flops as flops
from benchmarks.baselines.freeze_und import freeze_und_block
from benchmarks.harness import shapes
from benchmarks.harness.compare import UnavailableError
from benchmarks.harness.layer import make_case
from benchmarks.peers.bagel import bagel
from lmfusion.model.flops import SequenceCounts, flops_by_part

TINY_LLM = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
UNET = {"kind": "unet", "patch_size": 2, "channels": [16, 24], "num_blocks": 1}
TINY = flops.Model("tiny", TINY_LLM, UNET, 4, 8, 1e6, "MFLOP")
SMOLLM2 = replace(
    flops.SMOLLM2,
    llm={**flops.SMOLLM2.llm, "num_hidden_layers": 2, "vocab_size": 3000},
    patch_coder=UNET,
    latent_channels=4,
    latent_size=8,
)
"""Two of its layers, with a smaller vocabulary."""
PAIRS = flops.Mix("a few", (5, 7, 9, 11, 13, 15, 17))
BEFORE, AFTER, IMAGE = flops.TEXT_BEFORE, flops.TEXT_AFTER, flops.IMAGE


@pytest.mark.slow
def test_the_page_says_what_is_counted():
    page = flops.DOCS.read_text(encoding="utf-8")
    assert flops.with_tables(page, flops.tables()) == page, "python -m benchmarks.training_flops --keep"


@pytest.mark.parametrize("model", [TINY, SMOLLM2], ids=lambda model: model.name)
@pytest.mark.parametrize("way", flops.WAYS, ids=lambda way: way.name)
def test_meta_tensors_are_counted_as_real_ones(model, way):
    real, meta = (flops.count(flops.make_model(model, way, device), PAIRS) for device in ("cpu", "meta"))
    # On a CPU the head gets only labelled tokens: here all but one of each pair's tokens after the image, or of all
    assert 0.5 < real.pop(flops.HEAD).total / meta.pop(flops.HEAD).total <= 1
    assert real == meta
    assert all(part.total for part in real.values())


@pytest.mark.parametrize("way", flops.WAYS, ids=lambda way: way.name)
def test_parts_are_all_that_torch_counts(way):
    model = flops.make_model(TINY, way, "cpu")
    with FlopCounterMode(display=False) as counter:
        model(batch=flops.make_batch(model, PAIRS, way.frozen_text)).loss.backward()
    assert flops.total(flops.count(model, PAIRS)) == counter.get_total_flops()


@pytest.mark.parametrize("frozen_text", [True, False], ids=["frozen", "trained"])
def test_parts_are_those_that_training_reports(frozen_text):
    way = flops.Way("any", frozen_text=frozen_text)
    model = flops.make_model(TINY, way, "cpu")
    counts = flops.count(model, PAIRS)
    batch = flops.make_batch(model, PAIRS, frozen_text)
    parts = flops_by_part(model.config, SequenceCounts.of(batch), frozen_text=frozen_text)
    text = parts["constant text"] + parts["live text"]
    for names, expected in (
        ((BEFORE, AFTER), text),
        ((IMAGE,), parts["image tokens"]),
        ((flops.ATTENTION,), parts["attention"]),
        ((flops.HEAD,), parts["LM head"] + parts["BOI loss"]),
        ((flops.CODER,), parts["patch coder"]),
    ):
        counted = [sum(getattr(counts[name], kind) for name in names) for kind in ("forward", "backward")]
        assert counted == pytest.approx([expected.forward, expected.backward + expected.recomputed], rel=1e-3)


def test_classes_of_tokens():
    ours, trained, freeze_und, dense = (flops.count(flops.make_model(TINY, way, "cpu"), PAIRS) for way in flops.WAYS)
    assert ours[BEFORE].backward == 0
    assert ours[AFTER].backward == ours[AFTER].forward
    assert ours[IMAGE].backward == 2 * ours[IMAGE].forward
    for other in (trained, freeze_und, dense):
        assert [other[part].forward for part in (BEFORE, AFTER, IMAGE)] == [
            ours[part].forward for part in (BEFORE, AFTER, IMAGE)
        ]
        assert other[BEFORE].backward == 2 * other[BEFORE].forward
        assert other == trained


def layers(case, rows, weights, block):
    """Outputs of a layer in tower order, and gradients of its weights and rows."""
    rows = [x.detach().requires_grad_() for x in rows]
    outputs = block(tuple(rows), case.layout, *weights, case.rope)
    return rows, outputs


PEER_SHAPE = replace(shapes.TINY, qk_norm=True, qkv_bias=True)
DOCUMENTS = [[("text", 6), ("image", 10), ("text", 5)], [("text", 7), ("image", 12)]]


@pytest.mark.parametrize("shape", [shapes.TINY, PEER_SHAPE], ids=["plain", "norms and biases"])
def test_freeze_und_computes_the_layer_and_cuts_gradients(shape):
    case = make_case(shape, DOCUMENTS, torch.float32, torch.device("cpu"), frozen_text=False)
    rows, expected = layers(case, case.rows(0), (case.text, case.image), lk.routed_block)
    _, outputs = layers(case, rows, (case.text, case.image), freeze_und_block)
    for ours, theirs in zip(expected, outputs, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    names = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    text_grads = torch.autograd.grad(
        sum(output.sum() for output in outputs), [getattr(case.text, name) for name in names], retain_graph=True
    )
    assert not any(grad.any() for grad in text_grads), "zeros, but they are there"
    kv = case.image.qkv_proj
    [cut] = torch.autograd.grad(outputs[0].sum(), [kv], retain_graph=True)
    [whole] = torch.autograd.grad(expected[0].sum(), [kv])
    assert not cut.any()
    assert whole.any()


def counted_layer(call):
    """FLOPs of a layer forward and backward."""
    with FlopCounterMode(display=False) as counter:
        outputs = call()
        (sum(output.sum() for output in outputs) if isinstance(outputs, tuple) else outputs.sum()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("is_detached", [True, False], ids=["freeze_und", "trained"])
def test_bagels_own_layer_takes_the_same(is_detached):
    case = make_case(PEER_SHAPE, DOCUMENTS, torch.float32, torch.device("cpu"), frozen_text=False)
    try:
        layer = bagel(case, freeze_und=is_detached)
    except UnavailableError as error:
        pytest.skip(str(error))
    rows = [x.detach().requires_grad_() for x in case.rows(0)]
    joined = case.layout.to_sequence_order(torch.cat(rows)).detach().requires_grad_()
    theirs = counted_layer(lambda: layer.forward(joined))
    block = freeze_und_block if is_detached else lk.routed_block
    weights = [case.text, case.image]
    ours = counted_layer(lambda: block(tuple(rows), case.layout, *weights, case.rope))
    assert ours == theirs


def test_batches_that_could_be_mistaken_are_refused():
    model = flops.make_model(TINY, flops.OURS, "cpu")
    with pytest.raises(ValueError, match="choose captions so that these numbers differ"):
        flops.count(model, flops.Mix("as many image tokens as the model is wide", (5, 7, 9, 11)))


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="lacks the lines"):
        flops.with_tables("# FLOPs\n", "| a |\n")
