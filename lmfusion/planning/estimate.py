"""Estimates the memory, FLOPs, time and cost of a run from its recipe and configurations.

No weights are loaded and no data is read. Memory and FLOPs are calculated (lmfusion/planning/memory.py,
lmfusion/model/flops.py); the length of captions and the speed that GPUs reach are assumptions that the user can set.
"""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from lmfusion.model.batch import SpecialTokens, caption_first_document, image_first_document, pack
from lmfusion.model.flops import Flops, SequenceCounts, flops_by_part
from lmfusion.model.patch_coder import build_patch_coder
from lmfusion.planning.memory import RESERVED, Setup, checkpoint_bytes, memory_by_part
from lmfusion.planning.model_shape import ModelShape, count_parameters
from lmfusion.planning.presets import LLMS, model_shape
from lmfusion.training.config import RunConfig, TrainConfig

GIB = 2**30
PEAK_TFLOPS = {"bfloat16": 989.0, "float32": 67.0}
"""Peak of an H200 by its data sheet, without sparsity."""
LINKS = {"NVLink, 450 GB/s": 450e9, "nodes with 8 x 400 Gb/s": 400e9, "nodes with 1 x 400 Gb/s": 50e9}
"""Links between GPUs: nominal bytes per second that each GPU can receive while all do. Data from the network is passed
on inside the node, so a node receives about as much as each of its GPUs."""


@dataclass(frozen=True)
class Assumptions:
    """What the user states about hardware and data. Raises ValueError for impossible numbers."""

    num_gpus: int = 1
    gpu_memory: float = 141
    """GiB per GPU, which vendors write as GB: 141 for an H200, 80 for an A100 or H100."""
    peak_tflops: float | None = None
    """Peak of a GPU in train.dtype, by its data sheet or a measurement; None: PEAK_TFLOPS."""
    mfu: float = 0.4
    """Share of the peak at which a GPU computes, waiting included, recomputed operations counted."""
    tokens: float | None = None
    """Tokens to train on; None: train.num_steps * train.batch_tokens."""
    price: float | None = None
    """Price of a GPU hour."""
    caption_tokens: int = 32
    """Mean length of a caption."""
    llm: str | None = None
    """A name in LLMS, instead of the recipe's base."""

    def __post_init__(self) -> None:
        for name in ("num_gpus", "gpu_memory", "peak_tflops", "caption_tokens", "tokens", "price"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu must be a share of the peak, above 0 and at most 1, got {self.mfu}")
        if self.llm is not None and self.llm not in LLMS:
            raise ValueError(f"llm must be one of {', '.join(LLMS)}, got {self.llm!r}")


@dataclass(frozen=True)
class Estimate:
    """The result of `estimate`, in bytes, FLOPs and seconds."""

    num_parameters: dict[str, int]
    tokens_per_image: int
    tokens_per_document: float
    memory: dict[str, int]
    """Bytes on each GPU, by part."""
    memory_total: int
    memory_limit: int
    host_bytes: int
    """Bytes on the host, for each rank, while a checkpoint is written."""
    flops: dict[str, dict[str, float]]
    """By part: how many items of its kind (tokens, labels, images) there are per token, and the FLOPs of one: forward,
    backward, and recomputed (forward operations that the backward repeats)."""
    flops_per_token: float
    """Of the model, without recomputed operations: what MFU counts."""
    recomputed_flops_per_token: float
    encode_flops_per_image: int
    """Of the codec: not included above, and not needed with a latent cache."""
    tokens_per_second: float
    """Over all GPUs."""
    images_per_second: float
    reported_mfu: float
    """What metrics.jsonl would show: there, recomputed operations do not count."""
    tokens: float
    steps: float
    seconds: float
    dollars: float | None
    sequence_seconds: float
    """Time of one packed sequence on one GPU."""
    traffic_bytes: float
    """What each rank receives for one packed sequence: weights twice, and gradients."""
    traffic_seconds: dict[str, float]
    """How long that takes over each of LINKS. It can overlap with computing, so at best `sequence_seconds` hide it."""
    problems: list[str]
    """Reasons why the run would not start or not fit."""
    ways_out: list[str]
    """Changes with which it would fit."""
    assumed: list[str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def estimate(run: RunConfig, given: Assumptions) -> Estimate:
    """The estimate for `run` on the GPUs of `given`.

    Raises FileNotFoundError if the base LLM is not there and `given.llm` is None, ValueError if the model cannot be
    built.
    """
    shape = model_shape(run.model, given.llm)
    setup = setup_of(run.train, given.num_gpus)
    counts = expected_counts(shape, run, given.caption_tokens)

    def memory_of(setup: Setup) -> dict[str, int]:
        return memory_by_part(shape, counts, setup) | {"reserved (assumed)": RESERVED}

    memory, limit = memory_of(setup), int(given.gpu_memory * GIB)
    parts = flops_by_part(shape.config, counts, frozen_text=setup.frozen_text, recompute=setup.recompute)
    flops = sum(parts.values(), Flops())
    peak_tflops = given.peak_tflops or PEAK_TFLOPS[run.train.dtype]
    sequence_seconds = flops.total / (peak_tflops * 1e12 * given.mfu)
    tokens_per_second = given.num_gpus * counts.num_tokens / sequence_seconds
    tokens = given.tokens or run.train.num_steps * run.train.batch_tokens
    seconds = tokens / tokens_per_second
    total = sum(memory.values())
    traffic = _traffic_bytes(shape, setup)
    return Estimate(
        num_parameters=_num_parameters(shape, setup.frozen_text),
        tokens_per_image=round(counts.num_image / counts.num_images),
        tokens_per_document=counts.num_tokens / counts.num_images,
        memory=memory,
        memory_total=total,
        memory_limit=limit,
        host_bytes=checkpoint_bytes(shape, setup),
        flops=_flops_per_item(parts, counts),
        flops_per_token=flops.model / counts.num_tokens,
        recomputed_flops_per_token=flops.recomputed / counts.num_tokens,
        encode_flops_per_image=shape.codec.encode_flops,
        tokens_per_second=tokens_per_second,
        images_per_second=tokens_per_second * counts.num_images / counts.num_tokens,
        reported_mfu=given.mfu * flops.model / flops.total,
        tokens=tokens,
        steps=tokens / run.train.batch_tokens,
        seconds=seconds,
        dollars=None if given.price is None else seconds / 3600 * given.num_gpus * given.price,
        sequence_seconds=sequence_seconds,
        traffic_bytes=traffic,
        traffic_seconds={link: traffic / rate for link, rate in LINKS.items()} if traffic else {},
        problems=_problems(run, given, total),
        ways_out=_ways_out(setup, limit, memory_of) if total > limit else [],
        assumed=_assumed(run, given, peak_tflops, shape),
    )


def setup_of(train: TrainConfig, num_gpus: int) -> Setup:
    """The settings of `train` that the memory of each of `num_gpus` GPUs depends on."""
    return Setup(
        frozen_text=train.text_learning_rate_ratio == 0,
        dtype=getattr(torch, train.dtype),
        recompute=train.recompute,
        optimizer=train.optimizer,
        has_ema=train.ema_decay > 0,
        num_ranks=num_gpus,
    )


def expected_counts(shape: ModelShape, run: RunConfig, caption_tokens: int) -> SequenceCounts:
    """Mean counts of a full packed sequence of captioned images, whose captions have `caption_tokens` tokens.

    Raises ValueError if the latents do not divide into patches, or if a caption and its image do not fit.
    """
    config, latent_shape = shape.config, shape.codec.latent_shape
    data, vocab_size = run.data, config.text_config.vocab_size
    with torch.device("meta"):
        coder = build_patch_coder(config.image.patch_coder, latent_shape[0], config.image_hidden_size)
    num_image = coder.tokens_per_image(*latent_shape[1:])
    tokens = SpecialTokens(vocab_size, vocab_size + 1, eos_token_id=0)
    caption = [0] * min(caption_tokens, data.max_caption_tokens)
    kinds = (
        (data.image_first, image_first_document(caption, num_image, tokens)),
        ((1 - data.image_first) * (1 - data.caption_drop), caption_first_document(caption, num_image, tokens)),
        ((1 - data.image_first) * data.caption_drop, caption_first_document([], num_image, tokens)),
    )
    longest = max(document.num_tokens for _, document in kinds)
    if longest > data.seq_len:
        raise ValueError(
            f"data.seq_len must be at least {longest}, the tokens of an image and its caption, got {data.seq_len}; "
            "raise it, or use smaller images or larger patches"
        )
    is_frozen = run.train.text_learning_rate_ratio == 0
    sums = dict.fromkeys((f.name for f in fields(SequenceCounts) if f.name != "latent_shape"), 0.0)
    for share, document in kinds:
        latents = torch.empty(1, *latent_shape, device="meta")
        timesteps = torch.empty(1, dtype=torch.int64, device="meta")
        batch = pack([document], latents, latents, timesteps, frozen_text=is_frozen)
        counts = SequenceCounts.of(batch)
        for name in sums:
            sums[name] += share * getattr(counts, name)
    fill = data.seq_len / (sums["num_constant"] + sums["num_live"] + sums["num_image"])
    return SequenceCounts(**{name: fill * value for name, value in sums.items()}, latent_shape=latent_shape)


def _num_parameters(shape: ModelShape, frozen_text: bool) -> dict[str, int]:
    def total(prefix: str) -> int:
        return count_parameters([weight for weight in shape.weights if weight.name.startswith(prefix)])

    return {
        "text tower": total("text."),
        "image tower": total("image."),
        "patch coder (in the image tower)": total("image.patch_coder."),
        "trained": count_parameters(shape.trained(frozen_text)),
        "codec": shape.codec.num_parameters,
        "vision encoder": shape.num_vision_parameters,
    }


def _flops_per_item(parts: dict[str, Flops], counts: SequenceCounts) -> dict[str, dict[str, float]]:
    num_items = {
        "constant text": counts.num_constant,
        "live text": counts.num_live,
        "image tokens": counts.num_image,
        "attention": counts.num_tokens,
        "LM head": counts.num_labels,
        "BOI loss": counts.num_boi_targets,
        "patch coder": counts.num_images,
    }
    return {
        name: {"per_token": num_items[name] / counts.num_tokens}
        | {kind: value / max(num_items[name], 1e-9) for kind, value in asdict(part).items()}
        for name, part in parts.items()
    }


def _traffic_bytes(shape: ModelShape, setup: Setup) -> float:
    """Layers are gathered for the forward and for the backward, the rest once; gradients are reduced in float32."""
    e, trained, frozen = setup.dtype.itemsize, shape.trained(setup.frozen_text), shape.frozen(setup.frozen_text)
    layers = 2 * e * count_parameters([weight for weight in shape.weights if weight.is_in_layer])
    trained_root = 4 * count_parameters([weight for weight in trained if not weight.is_in_layer])
    frozen_root = e * count_parameters([weight for weight in frozen if not weight.is_in_layer])
    received = (setup.num_ranks - 1) / setup.num_ranks
    return received * (layers + trained_root + frozen_root + 4 * count_parameters(trained))


def _problems(run: RunConfig, given: Assumptions, total: int) -> list[str]:
    problems = []
    num_sequences = run.sequences_per_step
    if num_sequences % given.num_gpus:
        problems.append(
            f"train.batch_tokens / data.seq_len must be a multiple of the {given.num_gpus} GPUs, "
            f"got {num_sequences} packed sequences"
        )
    if total > given.gpu_memory * GIB:
        problems.append(f"each GPU must have {total / GIB:.1f} GiB, got {given.gpu_memory:g}")
    return problems


def _ways_out(setup: Setup, limit: int, memory_of: Callable[[Setup], dict[str, int]]) -> list[str]:
    """The smallest sets of changes with which the run fits, and the number of GPUs with which it fits unchanged."""
    changes: list[tuple[str, dict[str, Any]]] = [
        ("train.recompute=ffn", {"recompute": "ffn"}),
        ("train.recompute=layer", {"recompute": "layer"}),
        ("train.optimizer=adamw_8bit", {"optimizer": "adamw_8bit"}),
        ("train.ema_decay=0", {"has_ema": False}),
    ]
    useful = [(name, change) for name, change in changes if replace(setup, **change) != setup]
    found: list[set[str]] = []
    ways = []
    for num_changes in range(1, len(useful) + 1):
        for chosen in itertools.combinations(useful, num_changes):
            names = {name for name, _ in chosen}
            if sum(name.startswith("train.recompute") for name in names) > 1 or any(way <= names for way in found):
                continue
            changed = setup
            for _, change in chosen:
                changed = replace(changed, **change)
            total = sum(memory_of(changed).values())
            if total <= limit:
                found.append(names)
                ways.append(f"{' '.join(sorted(names))}: {total / GIB:.1f} GiB")
    for num_gpus in (2**i for i in range(1, 11)):
        if num_gpus > setup.num_ranks:
            total = sum(memory_of(replace(setup, num_ranks=num_gpus)).values())
            if total <= limit:
                return [*ways, f"{num_gpus} GPUs: {total / GIB:.1f} GiB on each"]
    return ways or ["no setting of the recipe is enough: lower data.seq_len, or use a smaller model"]


def _assumed(run: RunConfig, given: Assumptions, peak_tflops: float, shape: ModelShape) -> list[str]:
    data = run.data
    lines = [
        f"captions of {given.caption_tokens} tokens, {100 * data.image_first:g} % of documents with the image first, "
        f"{100 * data.caption_drop:g} % of the others without caption; packed sequences are full",
        f"GPUs compute at {given.mfu:g} of {peak_tflops:g} TFLOP/s, waiting for data and each other included: "
        "your figure, not a measurement",
        f"{RESERVED / GIB:g} GiB of each GPU for driver, libraries and memory that the allocator cannot use",
    ]
    if given.llm is not None:
        lines.append(f"the LLM has the sizes of {given.llm}")
    if shape.codec.is_assumed:
        lines.append(
            "there is no autoencoder at the codec's path yet: Transfusion's, 8 channels, an eighth of each side"
        )
    if any(source.kind in ("interleaved", "shape_edits") for source in data.sources):
        lines.append("interleaved documents and edits cost what pairs do")
    if shape.num_vision_parameters:
        lines.append("no input images, as in captioned images: conversations and edits take more text tokens")
    return lines
