"""Describe images in words.

    lmfusion caption runs/digits/model photo.png another.jpg
    lmfusion caption runs/digits/model photo.png --prompt "a handwritten"

Files may be JPEG, PNG or WEBP; images are cropped to the middle and resized to the model's size. Captions are printed
as soon as they are finished, in the order of the images. The same seed gives the same captions, whatever --batch-size.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmfusion.cli.answering import INTERRUPTED, run_to_the_end
from lmfusion.cli.loading import add_model_arguments, check_batch_size, load_model
from lmfusion.generation.options import OPTIONS

if TYPE_CHECKING:
    from lmfusion.generation import Event

HELP = "describe images in words"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--prompt", default="", help="how every caption begins")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="most tokens of a caption (default: 32)")
    parser.add_argument("--temperature", type=float, default=0.0, help=f"{OPTIONS['temperature'].help} (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help=f"{OPTIONS['top_p'].help} (default: 1)")


def run(args: argparse.Namespace) -> int:
    check_batch_size(args)

    from lmfusion.generation import GenerationOptions, encode_prompt
    from lmfusion.generation.api import EngineRequest, engine_for

    options = GenerationOptions(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed
    )
    model = load_model(args)
    prompt = args.prompt.strip()
    engine = None
    for start in range(0, len(args.images), args.batch_size):  # so that only a batch of images is in memory at a time
        images = args.images[start : start + args.batch_size]
        requests = [
            EngineRequest(encode_prompt(model, [Path(image), *([prompt] if prompt else [])]), options, start + i)
            for i, image in enumerate(images)
        ]
        engine = engine or engine_for(model, requests, args.batch_size)
        captions = _Captions(images, prompt)
        if not run_to_the_end(engine, requests, captions.show):
            print("lmfusion: interrupted", file=sys.stderr)
            return INTERRUPTED
    return 0


class _Captions:
    """Prints each caption of a batch as soon as it is finished and those before it are printed."""

    def __init__(self, images: Sequence[str], prompt: str) -> None:
        self._images, self._prompt = images, prompt
        self._texts = [""] * len(images)
        self._finished: set[int] = set()
        self._next = 0

    def show(self, i: int, event: "Event") -> None:
        """Take an event of the caption of image `i`."""
        from lmfusion.generation import Done, TextDelta

        if isinstance(event, TextDelta):
            self._texts[i] += event.text
        elif isinstance(event, Done):
            self._finished.add(i)
        while self._next in self._finished:
            caption = self._texts[self._next].strip()
            words = f"{self._prompt} {caption}" if self._prompt else caption
            print(f"{self._images[self._next]}\t{words}", flush=True)
            self._next += 1
