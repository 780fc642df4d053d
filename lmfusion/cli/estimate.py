"""Estimate a run before you pay for it: memory of each GPU, FLOPs, tokens per second, days and dollars.

This reads the recipe and the configurations of the base (config.json of a folder, or the header of a GGUF file) and of
the autoencoder; no weights and no data. If the LLM's files are not there yet, choose its sizes with --llm.

    lmfusion estimate recipes/llama3-8b-paper.yaml --llm llama3-8b --gpus 8 --tokens 0.25e12 --price 2.5
    lmfusion estimate recipes/llama3-8b-paper.yaml --llm llama3-8b train.optimizer=adamw_8bit train.recompute=layer

Memory and FLOPs are calculated. --mfu is your guess of what the GPUs reach, so the figures that depend on it are not
measurements. Exit code: 0 if the run fits, 1 if it would not start or not fit, 2 for bad input.
"""

import argparse
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmfusion.planning.estimate import Estimate

HELP = "memory, time and money that a recipe takes"

DAY = 86400.0
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file of the run; see recipes/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change a key of the recipe, such as train.recompute=layer"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs that share the run (default: 1)")
    parser.add_argument(
        "--gpu-memory",
        type=float,
        default=141,
        metavar="GB",
        help="memory of each GPU, as vendors count it (default: 141, an H200)",
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        metavar="X",
        help="peak of each GPU in train.dtype (default: an H200's data sheet, 989 in bfloat16 and 67 in float32)",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        help="share of the peak that GPUs reach, all waiting included (default: 0.4)",
    )
    parser.add_argument(
        "--tokens",
        type=float,
        metavar="N",
        help="tokens of text and images to train on (default: those of the recipe's steps)",
    )
    parser.add_argument("--price", type=float, metavar="X", help="price of a GPU hour")
    parser.add_argument(
        "--caption-tokens", type=int, default=32, metavar="N", help="mean length of a caption (default: 32)"
    )
    parser.add_argument(
        "--llm", metavar="NAME", help="take the sizes of llama3-8b, llama3.2-1b, smollm2-135m or llama3-llava-next-8b"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from lmfusion.planning.estimate import Assumptions, estimate
    from lmfusion.training.config import load_config

    given = Assumptions(
        num_gpus=args.gpus,
        gpu_memory=args.gpu_memory,
        peak_tflops=args.peak_tflops,
        mfu=args.mfu,
        tokens=args.tokens,
        price=args.price,
        caption_tokens=args.caption_tokens,
        llm=args.llm,
    )
    found = estimate(load_config(args.recipe, ["train.device=cuda", *args.overrides]), given)
    print(found.to_json() if args.json else report(found, args.gpus))
    return 1 if found.problems else 0


def report(found: "Estimate", num_gpus: int) -> str:
    """The estimate in tables, 100 columns."""
    parts = [_model(found), _memory(found), _flops(found), _time(found, num_gpus)]
    if found.traffic_bytes:
        parts.append(_traffic(found))
    parts.append(_list("Assumed", found.assumed))
    if found.problems:
        parts.append(_list("PROBLEMS", found.problems))
        if found.ways_out:
            parts.append(_list("It would fit with", found.ways_out))
    else:
        parts.append("The run fits.")
    return "\n\n".join(parts)


def _model(found: "Estimate") -> str:
    rows = [(name, f"{number / 1e6:,.1f} M") for name, number in found.num_parameters.items() if number]
    pair = f"{found.tokens_per_document:.1f} tokens per captioned image, {found.tokens_per_image} of them image tokens"
    return _table("Parameters", rows) + f"\n  {pair}"


def _memory(found: "Estimate") -> str:
    rows = [(name, f"{size / GIB:7.2f} GiB") for name, size in found.memory.items()]
    rows.append(("total", f"{found.memory_total / GIB:7.2f} GiB"))
    rows.append(("available", f"{found.memory_limit / GIB:7.2f} GiB"))
    host = f"  on the host, while a checkpoint is written: {found.host_bytes / GIB:.1f} GiB for each GPU"
    return _table("Memory of each GPU", rows) + "\n" + host


def _flops(found: "Estimate") -> str:
    header = ("", "per token", "forward", "backward", "recomputed", "total per token")
    rows = []
    for name, part in found.flops.items():
        of_one = [part[kind] / 1e9 for kind in ("forward", "backward", "recomputed")]
        total_per_token = part["per_token"] * sum(of_one)
        rows.append((name, f"{part['per_token']:.4f}", *(f"{giga:.3f}" for giga in of_one), f"{total_per_token:.3f}"))
    total = f"{(found.flops_per_token + found.recomputed_flops_per_token) / 1e9:.3f}"
    rows.append(("total", "", "", "", "", total))
    codec = ""
    if found.encode_flops_per_image:
        encode = f"{found.encode_flops_per_image / 1e9:,.0f} GFLOP"
        codec = f"\n  not included: encoding an image, {encode}, unless it comes from a latent cache"
    return _table("GFLOP of one token, label or image", [header, *rows]) + codec


def _time(found: "Estimate", num_gpus: int) -> str:
    rows = [
        ("tokens per second, all GPUs", f"{found.tokens_per_second:,.0f}"),
        ("images per second", f"{found.images_per_second:,.0f}"),
        ("MFU as metrics.jsonl counts it", f"{found.reported_mfu:.3f}"),
        ("tokens to train on", f"{found.tokens:.4g}"),
        ("steps", f"{found.steps:,.0f}"),
        ("days", f"{found.seconds / DAY:,.2f}"),
        ("GPU hours", f"{found.seconds / 3600 * num_gpus:,.2f}"),
    ]
    if found.dollars is not None:
        rows.append(("cost", f"{found.dollars:,.2f}"))
    return _table(f"Time on {num_gpus} GPU{'s' if num_gpus > 1 else ''}", rows)


def _traffic(found: "Estimate") -> str:
    rows = [
        ("", "seconds", "days at least"),
        ("computing", f"{found.sequence_seconds:.3f}", f"{found.seconds / DAY:,.1f}"),
    ]
    for link, seconds in found.traffic_seconds.items():
        days = found.seconds / DAY * seconds / found.sequence_seconds
        rows.append((f"moving, {link}", f"{seconds:.3f}", f"{days:,.1f}"))
    text = f"Each packed sequence moves {found.traffic_bytes / 1e9:,.1f} GB to each GPU; the slowest line is the limit"
    return _table(text, rows)


def _list(title: str, lines: Iterable[str]) -> str:
    return "\n".join([title, *(f"  - {line}" for line in lines)])


def _table(title: str, rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  "
        + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([title, *lines])
