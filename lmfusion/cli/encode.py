"""Encode the images and captions of a recipe once, so that training need not do it in every epoch.

    lmfusion encode recipes/mine.yaml caches/mine
    lmfusion encode recipes/mine.yaml caches/mine --dtype float16 --workers 16 --batch-size 32

Then name the cache in the recipe: data: {sources: [{kind: latents, path: caches/mine}]}. A recipe with several sources
gets a cache for each: caches/mine/0, caches/mine/1, ... docs/data.md tells what a cache holds, and when training
refuses it.

Started several times, or by torchrun on several GPUs, it shares the work. Killed and started again, it continues.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmfusion.cli.loading import read_without_weights

if TYPE_CHECKING:
    import torch

HELP = "turn a data set into latents and token ids, once"

NUM_DAMAGED_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file of the run that will train on it")
    parser.add_argument("output", help="folder of the cache: a new one, or one to continue in")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change a key of the recipe, such as data.max_damaged=0.05"
    )
    parser.add_argument("--shard-samples", type=int, default=2048, metavar="N", help="samples a file (default: 2048)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the latents; float32 keeps every bit, the others half of the space (default: float32)",
    )
    parser.add_argument(
        "--variance",
        action="store_true",
        help="keep the autoencoder's variance too, which data.sample_latents needs: twice the space",
    )
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="threads that read images (default: 4)")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="images encoded at a time; more is quicker on a GPU, and may change last bits (default: 1)",
    )


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from lmfusion.data.latent_cache.encode import EncodeOptions, encode_source
    from lmfusion.training.config import load_config

    config = load_config(args.recipe, args.overrides)
    options = EncodeOptions(
        shard_samples=args.shard_samples,
        dtype=args.dtype,
        keep_std=args.variance,
        num_workers=args.workers,
        batch_size=args.batch_size,
        max_damaged=config.data.max_damaged,
    )
    device = _device(config.train.device)
    model, codec, tokenizer = read_without_weights(config.model)
    variables = {**model.template_variables, **config.model.template_variables, **config.data.date_variables}
    sources = config.data.sources
    folders = [Path(args.output) / str(i) for i in range(len(sources))] if len(sources) > 1 else [Path(args.output)]
    for source, folder in zip(sources, folders, strict=True):
        with tqdm(desc=source.name, unit="sample", mininterval=1 if sys.stderr.isatty() else 30) as progress:

            def report(num_done: int, total: int, progress: tqdm = progress) -> None:
                progress.total = total
                progress.update(num_done)

            manifest = encode_source(
                source,
                folder,
                codec=codec,
                tokenizer=tokenizer,
                device=device,
                options=options,
                is_for_vlm=model.vlm_config is not None,
                template_variables=variables,
                report=report,
            )
        _tell(folder, manifest)
    print("train on it with\ndata:\n  sources:")
    for source, folder in zip(sources, folders, strict=True):
        print(f"    - {{kind: latents, path: {folder}, weight: {source.weight:g}}}")
    return 0


def _tell(folder: Path, manifest: dict[str, Any]) -> None:
    num_bytes = sum(shard["size"] for shard in manifest["shards"])
    print(
        f"{folder}: {manifest['plan']['num_samples']} samples, {manifest['num_images']} images, "
        f"{manifest['num_tokens']} tokens, {num_bytes / 1e6:.1f} MB"
    )
    damaged = [record for shard in manifest["shards"] for record in shard["damaged"]]
    if damaged:
        print(f"{manifest['num_damaged']} samples are damaged, and will be left out; manifest.json names them all")
    for record in damaged[:NUM_DAMAGED_SHOWN]:
        print(f"  sample {record['index']}: {record['reason']}")


def _device(name: str) -> "torch.device":
    """The recipe's device; under torchrun, this process's own GPU."""
    import os

    import torch

    from lmfusion.utils.devices import choose_device

    device = choose_device(name, "train.device")
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device
