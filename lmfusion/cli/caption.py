"""Describe images in words.

    lmfusion caption runs/digits/model photo.png another.jpg
    lmfusion caption runs/digits/model photo.png --prompt "a handwritten"

JPEG, PNG and WEBP files are read; they are cropped to the middle and resized to the model's size.
"""

import argparse

from lmfusion.cli.loading import add_model_arguments, load_model

HELP = "describe images in words"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--prompt", default="", help="how every caption begins")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="default: 32")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="choose among the likeliest tokens of this probability (default: 1)"
    )


def run(args: argparse.Namespace) -> int:
    from lmfusion.generation import caption_images

    captions = caption_images(
        load_model(args),
        args.images,
        prompt=args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    prefix = f"{args.prompt.strip()} " if args.prompt.strip() else ""
    for image, caption in zip(args.images, captions, strict=True):
        print(f"{image}\t{prefix}{caption}")
    return 0
