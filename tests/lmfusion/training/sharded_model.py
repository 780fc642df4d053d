"""Measurements of two processes for test_distributed.py: torchrun starts this, and each writes FOLDER/RANK.json.

FOLDER holds the LLMs. Beside the sharded model each process has a whole one of its own, which gets the batches of both.
"""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, Qwen3Config

from lmfusion.model.batch import Batch, Document, SpecialTokens, caption_first_document, image_first_document, pack
from lmfusion.model.modeling import LMFusion
from lmfusion.training.distributed import World, compile_layers, init_distributed, local_range, local_shard, parallelize
from tests.lmfusion.conftest import build_tokenizer
from tests.lmfusion.model.test_modeling import CODEC, FULL_WIDTH, IMAGE, SIZES, TOKENS_PER_IMAGE, save_llm

SIZES = {**SIZES, "vocab_size": 259}
LLAMA = LlamaConfig(**SIZES)
TIED = LlamaConfig(**SIZES, tie_word_embeddings=True)
UNET = {**IMAGE, "patch_coder": {"kind": "unet", "channels": (8, 8), "num_blocks": 1}}
CASES = {  # the LLM, the image tower, and whether the text tower is frozen
    "deep": (LLAMA, FULL_WIDTH, True),
    "narrow image tower": (TIED, IMAGE, True),
    "shallow": (Qwen3Config(**SIZES, head_dim=16), {**FULL_WIDTH, "separation": "shallow"}, True),
    "none": (LLAMA, {**FULL_WIDTH, "separation": "none"}, True),
    "trained text": (LLAMA, IMAGE, False),
    "trained text, tied": (TIED, FULL_WIDTH, False),
    "trained text, none": (LLAMA, {**FULL_WIDTH, "separation": "none"}, False),
    "unet": (LLAMA, UNET, True),
}
TOKENS = SpecialTokens(259, 260, bos_token_id=1, eos_token_id=2)


def save_llms(folder: Path) -> None:
    for case, (llm, _, _) in CASES.items():
        save_llm(folder / case, llm)
        build_tokenizer().save_pretrained(folder / case)


def build(folder: Path, case: str, dtype: torch.dtype = torch.float32) -> LMFusion:
    _, image, frozen = CASES[case]
    model = LMFusion.from_llm(folder / case, image=image, codec=CODEC, dtype=dtype)
    model.freeze_text(frozen)
    with torch.no_grad():  # the patch coder's last weights start at zero, which would make all other gradients zero
        generator = torch.Generator().manual_seed(3)
        for parameter in model.image.patch_coder.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return model.train()


def whole(model: LMFusion, dtype: torch.dtype) -> LMFusion:
    """The model that `parallelize` gives on one process, cast tower by tower."""
    model.compute_dtype = dtype
    model.text.to(dtype if model.frozen_text else torch.float32)
    model.image.float()
    return model


def batches(frozen_text: bool) -> list[Batch]:
    """Batches for ranks 0 and 1 in turn: ordinary ones, and pairs in which one lacks images, labels, or everything."""

    def batch_of(*documents: Document, seed: int = 0) -> Batch:
        num_images = sum(document.num_images for document in documents)
        generator = torch.Generator().manual_seed(seed)
        latents, noise = torch.randn(2, num_images, 1, 4, 4, generator=generator)
        timesteps = torch.randint(0, 1000, (num_images,), generator=generator)
        return pack(documents, latents, noise, timesteps, frozen_text=frozen_text)

    drawn, read = caption_first_document, image_first_document
    size = TOKENS_PER_IMAGE
    return [
        batch_of(drawn((5, 6, 7), size, TOKENS), read((8, 9), size, TOKENS)),
        batch_of(read((3, 4), size, TOKENS), read((5, 6, 7, 8), size, TOKENS), drawn((9,), size, TOKENS), seed=2),
        batch_of(Document().text((4, 5, 6)).marker(260).text((7, 8))),  # no image
        batch_of(drawn((3, 4), size, TOKENS), seed=3),
        batch_of(Document().image(size), seed=4),  # no label
        batch_of(read((5,), size, TOKENS), seed=5),
        batch_of(),
        batch_of(drawn((7, 8), size, TOKENS), seed=6),
    ]


def gradients(folder: Path, world: World, case: str) -> dict:
    """Losses and gradients over all batches, of the sharded and of the whole model."""
    alone, model = whole(build(folder, case), torch.float32), build(folder, case)
    parallelize(model, world, torch.float32)
    micro_batches = batches(model.frozen_text)
    losses = [alone(batch=batch).loss for batch in micro_batches]
    torch.stack(losses).sum().backward()
    mine = []
    for batch in micro_batches[world.rank :: world.size]:
        loss = model(batch=batch).loss
        (world.size * loss).backward()
        mine.append(loss.item())
    result = {"losses": mine, "expected": [loss.item() for loss in losses[world.rank :: world.size]], "errors": {}}
    for (name, found), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None) == (not found.requires_grad), name
        if found.grad is not None:
            error = (found.grad.full_tensor() - expected.grad).norm() / max(expected.grad.norm(), 1e-6)
            result["errors"][name] = error.item()
    return result


def training(folder: Path, world: World, dtype: torch.dtype) -> dict:
    """Four steps of AdamW, with generation, captioning and scoring before and between them."""
    alone, model = whole(build(folder, "narrow image tower", dtype), dtype), build(folder, "narrow image tower", dtype)
    parallelize(model, world, dtype)
    result: dict = {"scores": [], "same drawings": [], "same texts": []}
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2, fused=True) for m in (alone, model)
    ]
    micro_batches = batches(frozen_text=True)
    for step in range(4):
        drawings = [m.draw(["ab", "c"], num_steps=2) for m in (alone, model)]
        result["same drawings"].append(all(map(np.array_equal, *drawings)))
        texts = [
            m.generate(["ab"], max_new_tokens=3) + m.caption(drawings[0], max_new_tokens=3) for m in (alone, model)
        ]
        result["same texts"].append(texts[0] == texts[1])
        result["scores"].append([score_smaller_weights(m, micro_batches[0]) for m in (alone, model)])
        for rank in range(world.size):
            alone(batch=micro_batches[2 * step + rank]).loss.backward()
        (world.size * model(batch=micro_batches[2 * step + world.rank]).loss).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    states = optimizers[1].state
    result["states are the trained weights'"] = set(states) == {p for p in model.parameters() if p.requires_grad}
    result["dtypes"] = {name: str(parameter.dtype) for name, parameter in model.named_parameters()}
    return result


@torch.no_grad()
def score_smaller_weights(model: LMFusion, batch: Batch) -> float:
    """The loss of a model that temporarily has other weights, as when its averages are scored."""
    weights = [local_shard(weight) for weight in model.parameters() if weight.requires_grad]
    kept = [weight.clone() for weight in weights]
    torch._foreach_mul_(weights, 0.9)
    loss = model(batch=batch).loss.item()
    torch._foreach_copy_(weights, kept)
    return loss


def memory(folder: Path, world: World) -> dict:
    """Bytes of all weights, and of the storages that this rank holds of them."""
    model = build(folder, "deep", torch.bfloat16)
    parallelize(model, world, torch.bfloat16)
    weights = list(model.parameters())
    return {
        "bytes": sum(weight.numel() * weight.element_size() for weight in weights),
        "held": sum(local_shard(weight).untyped_storage().nbytes() for weight in weights),
        "frozen held": sum(local_shard(weight).numel() for weight in model.text.parameters()),
        "frozen": sum(weight.numel() for weight in model.text.parameters()),
    }


def parts(folder: Path, world: World) -> dict:
    """The rows of each weight that a rank holds, including weights that do not divide evenly."""
    alone, model = build(folder, "narrow image tower"), build(folder, "narrow image tower")
    parallelize(model, world, torch.float32)
    result = {}
    for (name, weight), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        first, end, size = local_range(weight)
        assert torch.equal(local_shard(weight), expected[first:end]) and size == len(expected)
        result[name] = (first, end, size)
    return result


def compiled(folder: Path, world: World) -> dict:
    """Losses of a sharded model with compiled (traced) layers, and of a whole model without."""
    alone, model = build(folder, "narrow image tower"), build(folder, "narrow image tower")
    parallelize(model, world, torch.float32)
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    compile_layers(model)
    micro_batches = batches(frozen_text=True)[world.rank : 4 : world.size]
    losses = []
    for batch in micro_batches:
        output = model(batch=batch)
        output.loss.backward()
        losses.append((output.loss.item(), alone(batch=batch).loss.item()))
    return {"losses": losses}


def main() -> None:
    folder = Path(sys.argv[1])
    with init_distributed("cpu") as found:
        torch.use_deterministic_algorithms(True)
        sums = found.sum_integers([found.rank, 2**40, -1])
        total = found.sum_tensor(torch.tensor([1.0, found.rank]))
        results = {"world": {"size": found.size, "sums": sums, "total": total.tolist()}}
        results |= {case: gradients(folder, found, case) for case in CASES}
        results |= {str(dtype): training(folder, found, dtype) for dtype in (torch.float32, torch.bfloat16)}
        results |= {check.__name__: check(folder, found) for check in (memory, parts, compiled)}
        found.barrier()
        (folder / f"{found.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
