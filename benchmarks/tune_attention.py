"""Finds the fastest tiles of the Triton attention kernels on this GPU.

Measures the tiles of the table and others, and prints the table with the best ones as JSON. It changes no file: copy a
better row by hand, and name the device.

    python -m benchmarks.tune_attention --head-dim 128 --budget 60

Without a CUDA device or Triton it prints a message and exits with 0.
"""

import argparse
import dataclasses
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

import lmfusion_kernels as lk
from lmfusion_kernels.triton.hybrid_attention_configurations import Configurations, Tile, configurations

LAUNCHES = ("forward", "split", "queries", "keys")
NUM_TOKENS = 8192
NUM_CACHED = 8192  # keys of each document of the batch that "split" decodes
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--launch", choices=LAUNCHES, nargs="+", default=list(LAUNCHES))
    parser.add_argument("--num-heads", type=int, default=32)
    parser.add_argument("--num-kv-heads", type=int, default=8)
    parser.add_argument(
        "--budget", type=float, default=60.0, help="seconds in all; tiles that are not reached are listed"
    )
    options = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        print("nothing to tune: triton is not installed (pip install triton)")
        return
    if not torch.cuda.is_available():
        print("nothing to tune: there is no CUDA device")
        return
    capability, dtype = torch.cuda.get_device_capability(), DTYPES[options.dtype]
    print(f"{torch.cuda.get_device_name()}, capability {capability[0]}.{capability[1]}, {options.dtype}")
    begin, share = time.monotonic(), options.budget / (len(options.head_dim) * len(options.launch))
    best = {}
    for head_dim in options.head_dim:
        table = configurations(head_dim, dtype.itemsize, capability)
        case = TuningCase.make(head_dim, dtype, options.num_heads, options.num_kv_heads)
        chosen = {}
        for launch in options.launch:
            begin += share
            chosen[launch] = tune(case, table, launch, end=begin)
        best[head_dim] = {launch: dataclasses.asdict(tile) for launch, tile in chosen.items()}
    print(json.dumps(best, indent=2))


@dataclass
class TuningCase:
    """Packed interleaved documents, and few queries of documents in a cache."""

    layout: lk.TokenLayout
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    few_q: torch.Tensor
    few_ranges: tuple[torch.Tensor, torch.Tensor]
    caches: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def make(cls, head_dim: int, dtype: torch.dtype, num_heads: int, num_kv_heads: int) -> "TuningCase":
        document = [("text", 412), ("image", 512), ("text", 612), ("image", 512)]
        layout = lk.TokenLayout.from_spans([document] * (NUM_TOKENS // 2048), frozen_text=False, device="cuda")

        def rows(count: int, heads: int) -> torch.Tensor:
            return torch.randn(count, heads, head_dim, device="cuda").to(dtype)

        q, k, v, dout = (rows(NUM_TOKENS, heads) for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads))
        few = lk.TokenLayout.from_spans(
            [[("text", 1)]] * 8,
            cached_lengths=[NUM_CACHED - 1] * 8,
            cache_starts=[NUM_CACHED * document for document in range(8)],
            cache_slots=NUM_CACHED * 8,
            device="cuda",
        )
        caches = rows(few.num_keys, num_kv_heads), rows(few.num_keys, num_kv_heads)
        return cls(layout, q, k, v, dout, rows(8, num_heads), (few.key_start, few.key_end), caches)

    def call(self, launch: str, tiles: Configurations) -> tuple[Callable[[], Any], float]:
        """The call to time, and its FLOPs of the visible pairs (bytes for "split")."""
        from lmfusion_kernels.triton import hybrid_attention

        layout, head_dim = self.layout, self.q.shape[2]
        scale, ranges = head_dim**-0.5, (layout.key_start, layout.key_end)
        if launch == "split":
            num_bytes = sum(cache.nbytes for cache in self.caches)
            return lambda: hybrid_attention.forward(
                self.few_q, *self.caches, *self.few_ranges, None, scale, tiles=tiles
            ), num_bytes
        pairs = int((layout.key_end - layout.key_start).sum()) * self.q.shape[1] * head_dim * 2
        if launch == "forward":
            return lambda: hybrid_attention.forward(
                self.q, self.k, self.v, *ranges, None, scale, tiles=tiles
            ), 2 * pairs
        out, lse = hybrid_attention.forward(self.q, self.k, self.v, *ranges, None, scale)
        listed = torch.arange(NUM_TOKENS if launch == "keys" else 0, dtype=torch.int32, device="cuda")
        by_key = tuple(x[: listed.numel()] for x in (layout.mask.query_start, layout.mask.query_end))
        arguments = (self.dout, self.q, self.k, self.v, out, lse, *ranges, listed, *by_key, None, scale)
        # "keys" is timed with dq, whose tiles stay the same.
        return lambda: hybrid_attention.backward(*arguments, tiles=tiles), (5 if launch == "keys" else 3) * pairs


def tune(case: TuningCase, table: Configurations, launch: str, end: float) -> Tile:
    """The fastest tile of one launch. The tile of the table is measured first."""
    best, best_seconds = getattr(table, launch), float("inf")
    tiles = list(candidates(best, launch))
    for number, tile in enumerate(tiles):
        if number > 0 and time.monotonic() > end:
            print(f"  {launch}: {len(tiles) - number} of {len(tiles)} not reached within the budget")
            break
        call, work = case.call(launch, dataclasses.replace(table, **{launch: tile}))
        try:
            seconds = measure(call)
        except Exception as error:  # a tile that does not fit must not stop the others
            print(f"  {launch} {describe(tile)}: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
            continue
        unit = "GB/s" if launch == "split" else "TFLOP/s"
        rate = work / seconds / (1e9 if launch == "split" else 1e12)
        note = " (the table's)" if number == 0 else ""
        print(f"  {launch} {describe(tile)}: {seconds * 1e6:.0f} us, {rate:.0f} {unit}{note}", flush=True)
        if seconds < best_seconds:
            best, best_seconds = tile, seconds
    return best


def candidates(own: Tile, launch: str) -> Iterator[Tile]:
    """The tile of the table, then others, ordered by how many numbers differ from it."""
    blocks = [own.block] if launch == "split" else [64, 128]
    loads = sorted({own.descriptors, False})
    tiles = [
        Tile(block, step, min(step, own.border), warps, stages, descriptors)
        for block, step, warps, stages, descriptors in product(blocks, (32, 64, 128), (4, 8), (1, 2, 3, 4), loads)
        # A group of four warps takes 64 rows of a product; with more warps, they would share rows.
        if launch == "split" or warps <= block // 16
    ]

    def differences(tile: Tile) -> int:
        return sum(a != b for a, b in zip(dataclasses.astuple(tile), dataclasses.astuple(own), strict=True))

    yield own
    yield from sorted((tile for tile in tiles if tile != own), key=differences)


def describe(tile: Tile) -> str:
    loads = ", TMA" if tile.descriptors else ""
    return f"{tile.block}x{tile.step} ({tile.border}), {tile.num_warps} warps, {tile.num_stages} stages{loads}"


def measure(call: Callable[[], Any], repeats: int = 11) -> float:
    """Median seconds by CUDA events; the first calls compile and warm up. The L2 cache is flushed before each."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    main()
