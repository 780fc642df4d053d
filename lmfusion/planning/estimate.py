"""What would a run take? Memory on each GPU, FLOPs, time and money, from its recipe and configurations alone.

No weights are loaded and no data is read. What is calculated, what is assumed and what the user states is told apart:
memory and FLOPs are calculated (lmfusion/planning/memory.py, flops.py), captions and the reach of the hardware assumed.
"""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from lmfusion.model.batch import SpecialTokens, caption_first_document, image_first_document, pack
from lmfusion.model.configuration import LMFusionConfig
from lmfusion.model.flops import Flops, SequenceCounts, flops_by_part
from lmfusion.model.patch_coder import build_patch_coder
from lmfusion.planning.memory import RESERVED, Setup, Size, checkpoint_bytes, memory_by_part, parameters
from lmfusion.planning.presets import LLMS, CodecFacts, codec_facts, model_config, vision_parameters
from lmfusion.training.config import RunConfig, TrainConfig

GIB = 2**30
PEAK_TFLOPS = {"bfloat16": 989.0, "float32": 67.0}
"""Of an H200, by its data sheet, without sparsity."""
LINKS = {"NVLink, 450 GB/s": 450e9, "nodes with 8 x 400 Gb/s": 400e9, "nodes with 1 x 400 Gb/s": 50e9}
"""What joins GPUs: nominal bytes a second that each can be given while all are. What comes to a node by its network is
handed on inside it, so a node takes in about as much as each of its GPUs."""


@dataclass(frozen=True)
class Assumptions:
    """What the user states. Raises ValueError for numbers that cannot be."""

    num_gpus: int = 1
    gpu_memory: float = 141
    """GiB a GPU: what vendors write as GB. 141 is an H200, 80 an A100 or H100."""
    peak_tflops: float | None = None
    """Of a GPU in train.dtype, by its data sheet or a measurement; None: PEAK_TFLOPS."""
    mfu: float = 0.4
    """Share of the peak that the model's FLOPs reach without recomputation."""
    tokens: float | None = None
    """To train on; None: what the recipe's steps come to."""
    price: float | None = None
    """Of a GPU for an hour."""
    caption_tokens: int = 32
    llm: str | None = None
    """One of LLMS, in place of the recipe's base."""

    def __post_init__(self) -> None:
        for name in ("num_gpus", "gpu_memory", "peak_tflops", "caption_tokens", "tokens", "price"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; it must be a positive number")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu is {self.mfu}; it is a share of the peak, above 0 up to 1")
        if self.llm is not None and self.llm not in LLMS:
            raise ValueError(f"no sizes of an LLM {self.llm!r} are known; known: {', '.join(LLMS)}")


@dataclass(frozen=True)
class Estimate:
    """What `estimate` found, in bytes, FLOPs and seconds."""

    num_parameters: dict[str, int]
    tokens_per_image: int
    tokens_per_document: float
    memory: dict[str, int]
    """On each GPU, by part."""
    memory_total: int
    memory_limit: int
    host_bytes: int
    """On the host, for each rank, while a checkpoint is written."""
    flops: dict[str, dict[str, float]]
    """By part: how many of its kind (tokens, labels, images) come on a token, and FLOPs of one: forward, backward, and
    again (forward operations that the backward repeats)."""
    flops_per_token: float
    """Of the model: what MFU counts."""
    flops_again_per_token: float
    encode_flops_per_image: int
    """Of the codec: not part of the above, and none with a latent cache."""
    tokens_per_second: float
    """Of all GPUs together."""
    images_per_second: float
    reported_mfu: float
    """What metrics.jsonl would show: there, operations done again count for nothing."""
    tokens: float
    steps: float
    seconds: float
    dollars: float | None
    row_seconds: float
    """One row on one GPU."""
    traffic_bytes: float
    """What each rank receives for one row: weights twice, and gradients."""
    traffic_seconds: dict[str, float]
    """How long that takes by each of LINKS: it can be hidden behind `row_seconds`, but no further."""
    problems: list[str]
    """Why the run would not start, or not fit."""
    ways_out: list[str]
    """Changes with which it would fit."""
    assumed: list[str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def estimate(run: RunConfig, given: Assumptions) -> Estimate:
    """What `run` takes on the GPUs of `given`.

    Raises FileNotFoundError where the base LLM is not there and none is named in its place, ValueError where the model
    cannot be built.
    """
    config = model_config(run.model, given.llm)
    codec, num_vision = codec_facts(config.codec), vision_parameters(config)
    setup = setup_of(run.train, given.num_gpus)
    rows = expected_row(config, run, given.caption_tokens, codec.latent_shape)
    sizes = parameters(config, codec.latent_shape[0], setup.frozen_text)

    def memory_of(setup: Setup) -> dict[str, int]:
        parts = memory_by_part(config, sizes, rows, setup, codec.num_parameters, num_vision)
        return parts | {"reserved (assumed)": RESERVED}

    memory, limit = memory_of(setup), int(given.gpu_memory * GIB)
    parts = flops_by_part(config, rows, frozen_text=setup.frozen_text, recompute=setup.recompute)
    flops = sum(parts.values(), Flops())
    peak_tflops = given.peak_tflops or PEAK_TFLOPS[run.train.dtype]
    row_seconds = flops.total / (peak_tflops * 1e12 * given.mfu)
    tokens_per_second = given.num_gpus * rows.num_tokens / row_seconds
    tokens = given.tokens or run.train.num_steps * run.train.batch_tokens
    seconds = tokens / tokens_per_second
    total = sum(memory.values())
    traffic = _traffic_bytes(sizes, setup)
    return Estimate(
        num_parameters=_num_parameters(sizes, codec) | {"vision encoder": num_vision},
        tokens_per_image=round(rows.num_image / rows.num_images),
        tokens_per_document=rows.num_tokens / rows.num_images,
        memory=memory,
        memory_total=total,
        memory_limit=limit,
        host_bytes=checkpoint_bytes(sizes, setup),
        flops=_flops_of_one(parts, rows),
        flops_per_token=flops.model / rows.num_tokens,
        flops_again_per_token=flops.recomputed / rows.num_tokens,
        encode_flops_per_image=codec.encode_flops,
        tokens_per_second=tokens_per_second,
        images_per_second=tokens_per_second * rows.num_images / rows.num_tokens,
        reported_mfu=given.mfu * flops.model / flops.total,
        tokens=tokens,
        steps=tokens / run.train.batch_tokens,
        seconds=seconds,
        dollars=None if given.price is None else seconds / 3600 * given.num_gpus * given.price,
        row_seconds=row_seconds,
        traffic_bytes=traffic,
        traffic_seconds={link: traffic / rate for link, rate in LINKS.items()} if traffic else {},
        problems=_problems(run, given, total),
        ways_out=_ways_out(setup, limit, memory_of) if total > limit else [],
        assumed=_assumed(run, given, peak_tflops, codec, num_vision),
    )


def setup_of(train: TrainConfig, num_gpus: int) -> Setup:
    """What of `train` decides the memory of each of `num_gpus` GPUs."""
    return Setup(
        frozen_text=train.text_learning_rate_ratio == 0,
        dtype=getattr(torch, train.dtype),
        recompute=train.recompute,
        optimizer=train.optimizer,
        has_ema=train.ema_decay > 0,
        num_ranks=num_gpus,
    )


def expected_row(
    config: LMFusionConfig, run: RunConfig, caption_tokens: int, latent_shape: tuple[int, int, int]
) -> SequenceCounts:
    """A full row of pairs with captions of `caption_tokens`, in the mean over their kinds.

    Raises ValueError where latents do not divide into patches, or no such pair fits into a row.
    """
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
            f"an image and its caption take {longest} slots, but data.seq_len is {data.seq_len}; "
            "raise it, or make images or patches smaller or larger"
        )
    is_frozen = run.train.text_learning_rate_ratio == 0
    sums = dict.fromkeys((f.name for f in fields(SequenceCounts) if f.name != "latent_shape"), 0.0)
    for share, document in kinds:
        latents = torch.empty(1, *latent_shape, device="meta")
        timesteps = torch.empty(1, dtype=torch.int64, device="meta")
        counts = SequenceCounts.of(pack([document], latents, latents, timesteps, frozen_text=is_frozen))
        for name in sums:
            sums[name] += share * getattr(counts, name)
    fill = data.seq_len / (sums["num_constant"] + sums["num_live"] + sums["num_image"])
    return SequenceCounts(**{name: fill * value for name, value in sums.items()}, latent_shape=latent_shape)


def _num_parameters(sizes: list[Size], codec: CodecFacts) -> dict[str, int]:
    def total(prefix: str) -> int:
        return sum(size.num_parameters for size in sizes if size.name.startswith(prefix))

    return {
        "text tower": total("text."),
        "image tower": total("image."),
        "patch coder (in the image tower)": total("image.patch_coder."),
        "trained": sum(size.num_parameters for size in sizes if size.is_trained),
        "codec": codec.num_parameters,
    }


def _flops_of_one(parts: dict[str, Flops], rows: SequenceCounts) -> dict[str, dict[str, float]]:
    counts = {
        "constant text": rows.num_constant,
        "live text": rows.num_live,
        "image tokens": rows.num_image,
        "attention": rows.num_tokens,
        "LM head": rows.num_labels,
        "begin of images": rows.num_boi_targets,
        "patch coder": rows.num_images,
    }
    return {
        name: {"per_token": counts[name] / rows.num_tokens}
        | {kind: value / max(counts[name], 1e-9) for kind, value in asdict(part).items()}
        for name, part in parts.items()
    }


def _traffic_bytes(sizes: list[Size], setup: Setup) -> float:
    """Layers are gathered for the forward and for the backward, the rest once; gradients are reduced in float32."""
    share = (setup.num_ranks - 1) / setup.num_ranks
    gathered = 0
    for size in sizes:
        if ".layers." in size.name:
            gathered += 2 * setup.dtype.itemsize * size.num_parameters
        else:
            gathered += (4 if size.is_trained else setup.dtype.itemsize) * size.num_parameters
    return share * (gathered + 4 * sum(size.num_parameters for size in sizes if size.is_trained))


def _problems(run: RunConfig, given: Assumptions, total: int) -> list[str]:
    problems = []
    num_rows = run.sequences_per_step
    if num_rows % given.num_gpus:
        problems.append(
            f"a step has {num_rows} rows (train.batch_tokens / data.seq_len), which {given.num_gpus} GPUs cannot "
            "share evenly"
        )
    if total > given.gpu_memory * GIB:
        problems.append(f"{total / GIB:.1f} GiB are needed on each GPU, of which {given.gpu_memory:g} are there")
    return problems


def _ways_out(setup: Setup, limit: int, memory_of: Callable[[Setup], dict[str, int]]) -> list[str]:
    """The smallest sets of changes that make a run fit, and how many GPUs would do without any."""
    changes: list[tuple[str, dict[str, Any]]] = [
        ("train.recompute=ffn", {"recompute": "ffn"}),
        ("train.recompute=layer", {"recompute": "layer"}),
        ("train.optimizer=adamw_8bit", {"optimizer": "adamw_8bit"}),
        ("train.ema_decay=0", {"has_ema": False}),
    ]
    useful = [(name, change) for name, change in changes if replace(setup, **change) != setup]
    found: list[set[str]] = []
    ways = []
    for count in range(1, len(useful) + 1):
        for chosen in itertools.combinations(useful, count):
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
    return ways or ["none of the recipe's settings is enough: use smaller rows (data.seq_len) or a smaller model"]


def _assumed(run: RunConfig, given: Assumptions, peak_tflops: float, codec: CodecFacts, num_vision: int) -> list[str]:
    data = run.data
    lines = [
        f"captions of {given.caption_tokens} tokens, {100 * data.image_first:g} % of documents with the image first, "
        f"{100 * data.caption_drop:g} % of the others without caption; rows are full",
        f"GPUs compute at {given.mfu:g} of {peak_tflops:g} TFLOP/s, waiting for data and each other included: "
        "a figure of yours, not a measurement",
        f"{RESERVED / GIB:g} GiB of each GPU for driver, libraries and what the allocator cannot use",
    ]
    if given.llm is not None:
        lines.append(f"the LLM has the sizes of {given.llm}")
    if codec.is_assumed:
        lines.append("there is no autoencoder at the codec's path yet: Transfusion's, 8 channels, an eighth of a side")
    if any(source.kind in ("interleaved", "shape_edits") for source in data.sources):
        lines.append("interleaved documents and edits cost what pairs do")
    if num_vision:
        lines.append("no image is seen, as in captioned images: conversations and edits take more rows of text")
    return lines
