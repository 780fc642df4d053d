"""Inspect data before training on it: show some samples, check all of them, or count the tokens of an epoch.

    lmfusion data show recipes/mine.yaml --output sheet.png
    lmfusion data check "webdataset=photos-{0000..0099}.tar" --workers 8
    lmfusion data count recipes/mine.yaml data.seq_len=2048

DATA is a recipe, or one or more sources as kind=path: folder=, webdataset=, parquet=, interleaved= or latents=, and
digits, openmoji, shapes or shape_edits without a path. docs/data.md describes them.

Exit code: 0, 1 if `check` finds a damaged sample, 2 bad input.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmfusion.data.config import SourceConfig
    from lmfusion.data.inspect import Contents, Epoch
    from lmfusion.data.samples import Source
    from lmfusion.model.codec import Codec
    from lmfusion.model.configuration import LMFusionConfig
    from lmfusion.training.config import RunConfig

HELP = "show, check or count the samples of a data set"

NUM_NAMED = 5
"""Damaged samples that are printed for each reason; --output has them all."""
DEFAULT_IMAGE_SIZE = 256
"""Pixels per side of rendered emoji without a recipe."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="make an image of some samples with their captions")
    check = actions.add_parser("check", help="decode every image, read every caption, and list the damaged samples")
    count = actions.add_parser("count", help="count samples, images and texts; with a recipe also tokens and packing")
    for action in (show, check, count):
        action.add_argument("data", metavar="DATA", help="a recipe, or kind=path")
        action.add_argument(
            "overrides", nargs="*", metavar="key=value", help="change a key of the recipe, or name another kind=path"
        )
        action.add_argument("--image", metavar="NAME", help="suffix (webdataset=) or column (parquet=) of the images")
        action.add_argument(
            "--caption", metavar="NAME", help="suffix or column of the captions, such as txt or json:prompt"
        )
    show.add_argument("--output", default="samples.png", metavar="FILE", help="PNG to write (default: samples.png)")
    show.add_argument("--samples", type=int, default=24, metavar="N", help="samples of each source (default: 24)")
    show.add_argument("--seed", type=int, default=0, help="seed that selects the samples (default: 0)")
    check.add_argument("--output", metavar="FILE", help="write every damaged sample to this jsonl file")
    for action in (check, count):
        action.add_argument("--workers", type=int, default=4, metavar="N", help="threads that read (default: 4)")
    count.add_argument(
        "--samples", type=int, metavar="N", help="with a recipe: estimate tokens from this many samples instead of all"
    )


def run(args: argparse.Namespace) -> int:
    for name, value in (("--workers", getattr(args, "workers", None)), ("--samples", getattr(args, "samples", None))):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    recipe, configs = _read_arguments(args)
    if args.action == "show":
        return _show(args, recipe, configs)
    if args.action == "check":
        return _check(args, recipe, configs)
    return _count(args, recipe, configs)


def _read_arguments(args: argparse.Namespace) -> tuple["RunConfig | None", list["SourceConfig"]]:
    """The recipe, if one was given, and the sources."""
    from lmfusion.data.config import KINDS, SourceConfig

    kind, _, _ = args.data.partition("=")
    if kind in KINDS:
        configs = []
        for item in (args.data, *args.overrides):
            kind, separator, path = item.partition("=")
            if kind not in KINDS:
                raise ValueError(f"a source must be kind=path with a kind of {', '.join(KINDS)}, got {item!r}")
            configs.append(SourceConfig(kind, path if separator else None, image=args.image, caption=args.caption))
        return None, configs
    if args.image is not None or args.caption is not None:
        raise ValueError("--image and --caption need kind=path; a recipe has them in data.sources")

    from lmfusion.training.config import load_config

    recipe = load_config(args.data, args.overrides)
    return recipe, recipe.data.sources


def _show(args: argparse.Namespace, recipe: "RunConfig | None", configs: list["SourceConfig"]) -> int:
    from PIL import Image

    from lmfusion.data.inspect import contact_sheet
    from lmfusion.data.sources.unused_files import report_unused
    from lmfusion.utils.files import atomic_write

    sources = _load(recipe, configs)
    for config, source in zip(configs, sources, strict=True):
        report_unused(source, config.name)
    options: dict[str, Any] = {}
    if recipe is not None and any(config.kind == "latents" for config in configs):
        _, codec, tokenizer = _read_model(recipe, sources)
        options = {"decode_latents": lambda latents: _decode(codec, latents), "decode_tokens": tokenizer.decode}
    sheets = [contact_sheet(source, args.samples, seed=args.seed, **options) for source in sources]
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    path = Path(args.output)
    with atomic_write(path) as file:
        whole.save(file, format="PNG")
    print(path)
    return 0


def _check(args: argparse.Namespace, recipe: "RunConfig | None", configs: list["SourceConfig"]) -> int:
    from lmfusion.data.inspect import by_reason, describe_damaged, read_all
    from lmfusion.utils.files import replace_text
    from lmfusion.utils.printing import escape_line

    damaged = []
    for config, source in zip(configs, _load(recipe, configs), strict=True):
        with _progress(config.name, len(source)) as report:
            contents = read_all(source, config.name, load_images=True, num_workers=args.workers, report=report)
        print(_contents_line(config, contents))
        _print_unused(config, source)
        damaged += contents.damaged
    if args.output is not None:
        lines = (json.dumps({"sample_id": d.sample_id, "reason": d.reason}, ensure_ascii=False) for d in damaged)
        replace_text(Path(args.output), "".join(f"{line}\n" for line in lines))
    if damaged:
        print("\n damaged  reason")
    for kind, of_kind in by_reason(damaged):
        print(f"{len(of_kind):8d}  {escape_line(kind)}")
        for damage in of_kind[:NUM_NAMED]:
            print(f"          - {escape_line(describe_damaged(damage))}")
        if len(of_kind) > NUM_NAMED:
            print(f"          - and {len(of_kind) - NUM_NAMED} more")
    return 1 if damaged else 0


def _count(args: argparse.Namespace, recipe: "RunConfig | None", configs: list["SourceConfig"]) -> int:
    from lmfusion.data.inspect import measure_epoch, read_all

    if recipe is None and args.samples is not None:
        raise ValueError("--samples needs a recipe, whose LLM has the tokenizer; leave it out, or give a recipe")
    sources = _load(recipe, configs)
    if args.samples is None:
        for config, source in zip(configs, sources, strict=True):
            with _progress(config.name, len(source)) as report:
                contents = read_all(source, config.name, load_images=False, num_workers=args.workers, report=report)
            print(_contents_line(config, contents))
            _print_unused(config, source)
    if recipe is None:
        print("tokens and packing need a recipe: its LLM has the tokenizer")
        return 0
    reader = _window_reader(recipe, sources)
    num_samples, data = sum(map(len, sources)), recipe.data
    with _progress("packing", min(num_samples, args.samples or num_samples)) as report:
        epoch = measure_epoch(
            reader, num_samples, data.seq_len, data.pack_window, max_samples=args.samples, report=report
        )
    _print_epoch(epoch, recipe)
    return 0


def _print_epoch(epoch: "Epoch", recipe: "RunConfig") -> None:
    data = recipe.data
    print(f"\none epoch, of {epoch.num_samples:,} samples, from {epoch.num_read:,} that were read:")
    steps = epoch.num_sequences * data.seq_len / recipe.train.batch_tokens
    for name, value in (
        ("tokens", f"{epoch.num_tokens:,.0f}"),
        ("  of text", f"{epoch.num_text_tokens:,.0f}, with bos, BOI and EOI"),
        ("  of images", f"{epoch.num_image_tokens:,.0f}"),
        ("sequences", f"{epoch.num_sequences:,.0f} of {data.seq_len} tokens"),
        ("packing", f"{100 * epoch.packing:.2f} % of the positions hold a token"),
        ("cut", f"{epoch.num_cut:,.0f} documents"),
        ("damaged", f"{epoch.num_damaged:,.0f} samples have no text that can be used"),
        ("steps", f"{steps:,.1f} of {recipe.train.batch_tokens:,} tokens"),
    ):
        print(f"  {name:12s}{value}")


def _contents_line(config: "SourceConfig", contents: "Contents") -> str:
    line = (
        f"{config.name}: {contents.num_samples:,} samples, {contents.num_images:,} images, {contents.num_texts:,} texts"
    )
    if contents.num_characters:
        line += f" of {contents.num_characters / contents.num_texts:.1f} characters"
    return f"{line}, {len(contents.damaged):,} damaged"


def _print_unused(config: "SourceConfig", source: "Source") -> None:
    from lmfusion.data.sources.unused_files import describe_unused

    for line in describe_unused(source, config.name):
        print(line)


def _load(recipe: "RunConfig | None", configs: list["SourceConfig"]) -> list["Source"]:
    from lmfusion.data.registry import load_source

    size = DEFAULT_IMAGE_SIZE if recipe is None else _image_size(recipe)
    return [load_source(config, size) for config in configs]


def _image_size(recipe: "RunConfig") -> int:
    from lmfusion.model.saved_files import read_config
    from lmfusion.utils.recipes import resolve_path

    model = recipe.model
    codec = model.codec if model.adapted is None else read_config(Path(resolve_path(model.adapted)))[1].codec
    return codec.image_size


def _read_model(recipe: "RunConfig", sources: list["Source"]) -> tuple["LMFusionConfig", "Codec", Any]:
    """Configuration, codec and tokenizer of the recipe's model.

    Raises ValueError for a latent cache that was made with others.
    """
    from lmfusion.cli.loading import read_without_weights
    from lmfusion.data.samples import LatentSource

    config, codec, tokenizer = read_without_weights(recipe.model)
    for source in sources:
        if isinstance(source, LatentSource):
            source.check_made_with(codec, tokenizer)
    return config, codec, tokenizer


def _window_reader(recipe: "RunConfig", sources: list["Source"]) -> Any:
    """What plans the sequences of a run, as its loader does."""
    import torch

    from lmfusion.data.pipeline.packing import WindowReader
    from lmfusion.model.batch import SpecialTokens
    from lmfusion.model.patch_coder import build_patch_coder

    config, codec, tokenizer = _read_model(recipe, sources)
    with torch.device("meta"):
        patch_coder = build_patch_coder(config.image.patch_coder, codec.latent_channels, config.image_hidden_size)
    return WindowReader(
        recipe.data,
        sources,
        tokenizer=tokenizer,
        tokens=SpecialTokens.of(tokenizer, config.text_config.vocab_size),
        tokens_per_image=patch_coder.tokens_per_image(codec.latent_size, codec.latent_size),
        diffusion=config.diffusion,
        seed=recipe.train.seed,
        vlm_config=config.vlm_config,
        template_variables={
            **config.template_variables,
            **recipe.model.template_variables,
            **recipe.data.date_variables,
        },
    )


def _decode(codec: "Codec", latents: Any) -> Any:
    from lmfusion.images.preprocessing import to_pil

    return to_pil(codec.decode(latents.mean[None].float()))[0]


@contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else 30
    with tqdm(desc=name, total=total, unit="sample", mininterval=interval, leave=False) as progress:
        yield progress.update
