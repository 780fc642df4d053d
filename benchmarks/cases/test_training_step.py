"""A whole training step with layers of a real size: forward, backward, clipping and optimizer.

The rate counts the FLOPs that the model needs (lmfusion/model/flops.py), without recomputation; its share of the
measured ceiling is the MFU. On a GPU there are as many layers as fit by calculation (lmfusion/planning/memory.py).
"""

import functools
from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig

from benchmarks.harness import shapes
from benchmarks.harness.compare import Contestant, Row
from lmfusion.model.batch import Batch, SpecialTokens, caption_first_document, image_first_document, pack
from lmfusion.model.configuration import LMFusionConfig
from lmfusion.model.flops import SequenceCounts, batch_flops
from lmfusion.model.modeling import LMFusion
from lmfusion.planning.memory import Setup, memory_by_part
from lmfusion.planning.model_shape import CodecShape, ModelShape
from lmfusion.training.config import TrainConfig
from lmfusion.training.distributed import World, parallelize
from lmfusion.training.optimizer import Optimizer, clip_gradients

SHAPES = [shapes.LMFUSION_8B, shapes.SMOLLM2] if shapes.HAS_GPU else [shapes.SMOLLM2]
VOCABULARY = 128_256 if shapes.HAS_GPU else 8192
ROW_TOKENS = 4096 if shapes.HAS_GPU else 1024
MOST_LAYERS = 32 if shapes.HAS_GPU else 2
CAPTION = 32
"""Tokens; one image in five comes before its caption."""
LATENTS = (8, 32, 32) if shapes.HAS_GPU else (3, 16, 16)
"""(channels, height, width): 256 and 64 tokens per image."""
MEMORY_SHARE = 0.85
"""Share of a GPU's memory that the step may take by calculation."""
UNMOVED = {"learning_rate": 1e-30, "min_learning_rate": 0.0}
"""An update so small that it leaves weights as they are: all contestants share them and must compute the same."""


class PassLatents(torch.nn.Module):
    """A stand-in for the codec, which takes no part in a step."""

    latent_channels, latent_size = LATENTS[0], LATENTS[1]


@dataclass(frozen=True)
class StepCase:
    """One model, its optimizer and one packed sequence."""

    model: LMFusion
    optimizer: Optimizer
    batch: Batch
    flops: int


def model_config(shape, num_layers):
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=num_layers, num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads,
        tie_word_embeddings=shape == shapes.SMOLLM2,
    )  # fmt: skip
    coder = {"kind": "unet"} if shapes.HAS_GPU else {"kind": "unet", "channels": [32, 64], "num_blocks": 1}
    return LMFusionConfig(text, {"patch_coder": coder})


def make_sequence():
    """Pairs that fill a packed sequence, on the CPU."""
    tokens = SpecialTokens(VOCABULARY, VOCABULARY + 1, eos_token_id=2)
    num_image = LATENTS[1] * LATENTS[2] // 4
    num_pairs = ROW_TOKENS // (CAPTION + num_image + 2)
    generator = torch.Generator().manual_seed(0)
    documents = []
    for i in range(num_pairs):
        caption = torch.randint(VOCABULARY, (CAPTION,), generator=generator).tolist()
        make = image_first_document if i % 5 == 4 else caption_first_document
        documents.append(make(caption, num_image, tokens))
    latents, noise = (torch.randn(num_pairs, *LATENTS, generator=generator) for _ in range(2))
    return pack(documents, latents, noise, torch.randint(1000, (num_pairs,), generator=generator))


def layers_that_fit(shape, dtype, device, counts):
    """As many as a step without recomputation has room for."""
    if device.type != "cuda":
        return MOST_LAYERS
    room = MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]
    setup = Setup(dtype=dtype, has_ema=False)

    def fits(num_layers):
        model_shape = ModelShape(model_config(shape, num_layers), CodecShape(LATENTS))
        return sum(memory_by_part(model_shape, counts, setup).values()) <= room

    return next((n for n in range(MOST_LAYERS, 1, -1) if fits(n)), 1)


@functools.lru_cache(maxsize=1)  # a GPU can hold only one of the largest
def make_case(shape, dtype, device):
    batch = make_sequence()
    config = model_config(shape, layers_that_fit(shape, dtype, device, SequenceCounts.of(batch)))
    torch.manual_seed(0)
    with device:
        model = LMFusion(config, PassLatents()).train()
    torch.nn.init.normal_(model.image.patch_coder.conv_out.weight, std=0.02)  # with zeros no gradient would flow back
    parallelize(model, World(0, 1, device), dtype)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    flops = batch_flops(config, batch, frozen_text=True)
    return StepCase(model, Optimizer(weights, TrainConfig(**UNMOVED)), batch.to(device), flops)


def contestant(case, recompute):
    def prepare(seed):
        def step():
            case.model.recompute = recompute
            loss = case.model(batch=case.batch).loss
            loss.backward()
            norm = clip_gradients(case.optimizer.weights.values(), max_norm=1.0)
            case.optimizer.step(0)
            return loss.detach(), norm

        return step

    return Contestant(prepare)


@pytest.mark.parametrize("dtype", shapes.DTYPES[:1], ids=shapes.dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_step(record, device, shape, dtype):
    make_case.cache_clear()
    case = make_case(shape, dtype, device)
    num_layers = case.model.config.text_config.num_hidden_layers
    contestants = {"ours": contestant(case, "none")}
    contestants |= {f"ours, recompute={mode}": contestant(case, mode) for mode in ("ffn", "layer")}
    least = {"share_of_ceiling": 0.55} if shapes.HAS_GPU and shape == shapes.LMFUSION_8B else {}
    row = Row("training_step", f"{num_layers} layers, pairs", dtype, "forward+backward+update", shape.name,
              case.batch.layout.num_tokens, flops=case.flops, least=least)  # fmt: skip
    record(row, contestants)
    make_case.cache_clear()
