"""Counts the FLOPs of a training step by class of its tokens, and of other ways to train on the same tokens.

    python -m benchmarks.training_flops            prints the tables
    python -m benchmarks.training_flops --keep     writes them into docs/planning.md

Every matrix product, convolution and attention of a real forward and backward is counted as it passes torch's
dispatcher, with the formulas of torch.utils.flop_counter. On the meta device the same code runs without numbers, so
that a model of 8 billion parameters can be counted anywhere; tests/benchmarks/test_training_flops.py compares both.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig

from benchmarks.baselines.freeze_und import freeze_und_block
from lmfusion.model.batch import Batch, Document, SpecialTokens, caption_first_document, image_first_document, pack
from lmfusion.model.codec import CodecConfig, load_codec
from lmfusion.model.configuration import ImageTowerConfig, LMFusionConfig
from lmfusion.model.modeling import LMFusion
from lmfusion_kernels.layout.token_layout import TokenLayout

DOCS = Path(__file__).resolve().parents[1] / "docs" / "planning.md"
BEGIN, END = "<!-- made by python -m benchmarks.training_flops --keep -->\n", "<!-- end -->\n"

TEXT_BEFORE, TEXT_AFTER, IMAGE = "text before the image", "text after it, BOI, EOI", "image"
ATTENTION, HEAD, CODER = "attention", "LM head", "patch coder"
PARTS = (TEXT_BEFORE, TEXT_AFTER, IMAGE, ATTENTION, HEAD, CODER)
ATTENTION_OPS = ("lmfusion::hybrid_attention", "lmfusion::hybrid_attention_backward")
RANGES = ("key_start", "key_end", "query_start", "query_end")
"""Arguments of these ops that define the visible pairs."""


@dataclass(frozen=True)
class Model:
    """Sizes of an LLM and of the patch coder beside it."""

    name: str
    llm: dict[str, Any]
    patch_coder: dict[str, Any]
    latent_channels: int
    latent_size: int
    unit: float
    """FLOPs per unit of the figures in its table."""
    unit_name: str


SMOLLM2 = Model(
    "SmolLM2-135M",
    {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    {"kind": "unet", "patch_size": 2, "channels": [64, 128], "num_blocks": 2},
    8, 32, 1e9, "GFLOP",
)  # fmt: skip
LLAMA3_8B = Model(
    "Llama-3 8B",
    {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    {"kind": "unet", "patch_size": 2, "channels": [640, 992], "num_blocks": 3},
    8, 32, 1e12, "TFLOP",
)  # fmt: skip
"""LMFusion's sizes: 256 tokens per image, from 32 x 32 x 8 latents."""


@dataclass(frozen=True)
class Way:
    """A way to train on the same tokens."""

    name: str
    frozen_text: bool = False
    separation: str = "deep"
    block: Any = None
    """The function that computes a layer; None: ours."""


OURS = Way("ours: frozen text", frozen_text=True)
WAYS = (
    OURS,
    Way("both towers trained"),
    Way("`freeze_und`", block=freeze_und_block),
    Way("dense Transfusion", separation="none"),
)
BESIDE_OTHER_PAIRS = (OURS, WAYS[1], WAYS[3])
"""Counted for all mixes; `freeze_und` is slow to count, and the first mix is enough to show it."""

CAPTION_LENGTHS = tuple(range(17, 57, 2))
"""Tokens of the captions of a batch, 36 on average."""


@dataclass(frozen=True)
class Mix:
    """Pairs of a caption and an image, as `python -m benchmarks.training_flops` packs them."""

    name: str
    caption_lengths: tuple[int, ...] = CAPTION_LENGTHS
    image_first_every: int = 5
    """One in this many pairs has its image first, the others their caption; 1: all have the image first."""

    def documents(self, tokens: SpecialTokens, num_image_tokens: int) -> list[Document]:
        documents = []
        for i, length in enumerate(self.caption_lengths):
            make = image_first_document if i % self.image_first_every == 0 else caption_first_document
            documents.append(make([5] * length, num_image_tokens, tokens))
        return documents


PAPER = Mix("80 % caption first, 20 % image first, captions of 36 tokens")
MIXES = (
    PAPER,
    Mix("all image first", image_first_every=1),
    Mix("80 / 20, captions of 256 tokens", tuple(length + 220 for length in CAPTION_LENGTHS)),
    Mix("80 / 20, captions of 1,024 tokens", tuple(length + 988 for length in CAPTION_LENGTHS)),
)


@dataclass
class Count:
    """FLOPs of one part."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward


class FlopsByPart(TorchDispatchMode):
    """Counts the ops that pass the dispatcher, by part of the model.

    A product belongs to the class of tokens whose number is one of its sizes, if the other two are those of a layer's
    weight; to the LM head if they are those of the vocabulary's or the marker rows' head; and else to the patch coder.
    """

    def __init__(self, model: LMFusion, layout: TokenLayout, num_before: int) -> None:
        """layout: of the batch, on the CPU. num_before: rows that are constant with frozen text."""
        super().__init__()
        self.parts = {name: Count() for name in PARTS}
        self.is_backward = False
        text = model.config.text_config
        self._layer_sizes = {
            tuple(sorted(weight.shape))
            for tower in (model.text.layers, model.image.layers)
            for weight in tower.parameters()
            if weight.dim() == 2
        }
        self._head_sizes = {tuple(sorted((rows, text.hidden_size))) for rows in (text.vocab_size, 2)}
        self._shares = {
            layout.num_text: {TEXT_BEFORE: num_before, TEXT_AFTER: layout.num_text - num_before},
            layout.num_text - num_before: {TEXT_AFTER: 1},
            layout.num_image: {IMAGE: 1},
        }
        sizes = {size for pair in self._layer_sizes for size in pair}
        if len(self._shares) < 3 or sizes & set(self._shares):
            raise ValueError(
                f"the batch has {sorted(self._shares)} tokens, and layers have the sizes {sorted(sizes)}; choose "
                "captions so that these numbers differ, for they say what a product belongs to"
            )
        self._layout = layout
        self._real: dict[int, Tensor] = {}

    def on_meta(self, layout: TokenLayout) -> None:
        """Where an op is given a vector of `layout`, a copy without values, take the real one."""
        real = self._layout.vectors
        self._real = {id(vector): real[name] for name, vector in layout.vectors.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            name = func._schema.name
            given = self._with_ranges(func, args) if name in ATTENTION_OPS else args
            self._add(name, args, int(flop_registry[packet](*given, **(kwargs or {}), out_val=out)))
        return out

    def _with_ranges(self, func: Any, args: Sequence[Any]) -> list[Any]:
        given = list(args)
        for i, (argument, value) in enumerate(zip(func._schema.arguments, args, strict=False)):
            if argument.name in RANGES and value.is_meta:
                # A vector outside the layout was computed by `lk.hybrid_attention`, for all tokens
                given[i] = self._real.get(id(value), getattr(self._layout.mask, argument.name))
                assert given[i].shape == value.shape
        return given

    def _add(self, name: str, args: Sequence[Any], flops: int) -> None:
        for part, share in self._shares_of(name, args).items():
            count = self.parts[part]
            if self.is_backward:
                count.backward += flops * share[0] // share[1]
            else:
                count.forward += flops * share[0] // share[1]

    def _shares_of(self, name: str, args: Sequence[Any]) -> dict[str, tuple[int, int]]:
        """The parts that a product belongs to, and their shares as fractions."""
        if name in ATTENTION_OPS:
            return {ATTENTION: (1, 1)}
        if name in ("aten::mm", "aten::addmm"):
            left, right = args[-2:]
            sizes = [left.shape[0], left.shape[1], right.shape[1]]
            for rows in sizes:
                others = sizes.copy()
                others.remove(rows)
                pair = tuple(sorted(others))
                if pair in self._layer_sizes and rows in self._shares:
                    total = sum(self._shares[rows].values())
                    return {part: (share, total) for part, share in self._shares[rows].items()}
                if pair in self._head_sizes:
                    return {HEAD: (1, 1)}
        return {CODER: (1, 1)}


def make_model(model: Model, way: Way, device: str) -> LMFusion:
    """The model in training, with random weights, or without any on the meta device."""
    codec = load_codec(CodecConfig(kind="pixels", channels=3, image_size=model.latent_size))
    codec.latent_channels = model.latent_channels  # the autoencoder itself takes no part in a step
    image = ImageTowerConfig(patch_coder=model.patch_coder, separation=way.separation)  # type: ignore[arg-type]
    with torch.device(device):
        built = LMFusion(LMFusionConfig(LlamaConfig(**model.llm), image, codec.config), codec).train()
    built.freeze_text(way.frozen_text)
    if way.block is not None:
        for layer in built.text.layers:
            layer.block = way.block
    return built


def make_batch(model: LMFusion, mix: Mix, frozen_text: bool) -> Batch:
    """The pairs of `mix`, packed for the model, on the CPU."""
    tokens = SpecialTokens(model.boi_token_id, model.eoi_token_id, bos_token_id=1, eos_token_id=2)
    documents = mix.documents(tokens, model.tokens_per_image)
    size = model.codec.latent_size
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(documents), model.codec.latent_channels, size, size, generator=generator)
    timesteps = torch.full((len(documents),), 500)
    return pack(documents, latents, latents.flip(0), timesteps, frozen_text=frozen_text)


def count(model: LMFusion, mix: Mix) -> dict[str, Count]:
    """FLOPs of the forward and backward of one step on the pairs of `mix`, by part."""
    device = model.text.norm.weight.device
    batch = make_batch(model, mix, model.frozen_text)
    counter = FlopsByPart(model, batch.layout, make_batch(model, mix, frozen_text=True).layout.num_constant)
    placed = batch.to(device)
    if device.type == "meta":
        counter.on_meta(placed.layout)
    model.zero_grad()
    with counter:
        loss = model(batch=placed).loss
        counter.is_backward = True
        loss.backward()
    return counter.parts


def total(parts: dict[str, Count]) -> int:
    return sum(part.total for part in parts.values())


def tables_of(model: Model, mixes: Sequence[Mix]) -> Iterator[str]:
    """Markdown: parts of the step on the first of `mixes` by way, and the whole step on all of them beside ours."""
    built = {way: make_model(model, way, "meta") for way in WAYS}
    ways = {mix: WAYS if mix == mixes[0] else BESIDE_OTHER_PAIRS for mix in mixes}
    counts = {mix: {way: count(built[way], mix) for way in ways[mix]} for mix in mixes}
    layouts = {mix: make_batch(built[OURS], mix, frozen_text=True).layout for mix in mixes}
    yield from _table_of_parts(model, mixes[0], counts[mixes[0]], layouts[mixes[0]])
    if len(mixes) > 1:
        yield from _table_of_mixes(model, counts, layouts)


def _table_of_parts(model: Model, mix: Mix, counts: dict[Way, dict[str, Count]], layout: TokenLayout) -> Iterator[str]:
    num_tokens = {TEXT_BEFORE: layout.num_constant, TEXT_AFTER: layout.num_live, IMAGE: layout.num_image}
    names = " | ".join(way.name for way in WAYS)

    def figures(flops: Sequence[int]) -> str:
        return " | ".join(f"{value / model.unit:,.1f}" for value in flops)

    yield f"### {model.name}: {mix.name}"
    yield ""
    yield f"{model.unit_name} of one step on {layout.num_tokens:,} tokens."
    yield ""
    yield f"| | tokens | ours, forward | ours, backward | {names} |"
    yield "| --- |" + " ---: |" * (3 + len(WAYS))
    for part in PARTS:
        ours = counts[OURS][part]
        tokens = f"{num_tokens[part]:,}" if part in num_tokens else ""
        flops = [ours.forward, ours.backward, *(counts[way][part].total for way in WAYS)]
        yield f"| {part} | {tokens} | {figures(flops)} |"
    forward = sum(part.forward for part in counts[OURS].values())
    totals = [total(counts[way]) for way in WAYS]
    flops = [forward, totals[0] - forward, *totals]
    yield f"| **all** | {layout.num_tokens:,} | {figures(flops)} |"
    yield "| relative to ours | | | | " + " | ".join(f"{value / totals[0]:.2f}" for value in totals) + " |"
    yield ""


def _table_of_mixes(
    model: Model, counts: dict[Mix, dict[Way, dict[str, Count]]], layouts: dict[Mix, TokenLayout]
) -> Iterator[str]:
    names = " | ".join(f"{way.name} / ours" for way in BESIDE_OTHER_PAIRS[1:])
    yield f"### {model.name}: other pairs"
    yield ""
    yield f"| pairs | text | ours, {model.unit_name} | {names} |"
    yield "| --- |" + " ---: |" * (1 + len(BESIDE_OTHER_PAIRS))
    for mix, layout in layouts.items():
        totals = [total(counts[mix][way]) for way in BESIDE_OTHER_PAIRS]
        ratios = " | ".join(f"{value / totals[0]:.2f}" for value in totals[1:])
        share = layout.num_text / layout.num_tokens
        yield f"| {mix.name} | {share:.0%} | {totals[0] / model.unit:,.0f} | {ratios} |"
    yield ""


def tables() -> str:
    """The generated tables of docs/planning.md."""
    return "\n".join([*tables_of(LLAMA3_8B, MIXES), *tables_of(SMOLLM2, [PAPER])]) + "\n"


def with_tables(page: str, made: str) -> str:
    """The page with `made` between its markers. Raises ValueError for a page without them."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks the lines {BEGIN!r} and {END!r} around its tables")
    return head + begin + "\n" + made + end + tail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="write the tables into docs/planning.md")
    arguments = parser.parse_args()
    made = tables()
    if arguments.keep:
        DOCS.write_text(with_tables(DOCS.read_text(encoding="utf-8"), made), encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()
