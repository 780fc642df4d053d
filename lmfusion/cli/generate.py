"""Draw an image of each prompt, or go on writing from it with --text.

    lmfusion generate runs/digits/model "a handwritten seven" "a three" --output drawings
    lmfusion generate runs/digits/model "a three" --sampler dpm-solver --num-steps 20 --guidance-scale 2 --count 4
    lmfusion generate runs/digits/model "Why is the sky blue?" --text --chat

Images become DIR/0000.png, 0001.png, ... in the order of the prompts. The same seed gives the same images, whatever
--batch-size.
"""

import argparse
import os
from pathlib import Path

from lmfusion.cli.loading import add_model_arguments, load_model

HELP = "draw images from prompts, or write text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw, or with --text what to go on from")

    drawing = parser.add_argument_group("drawing")
    drawing.add_argument("--output", default="drawings", metavar="DIR", help="folder of the images (default: drawings)")
    drawing.add_argument("--count", type=int, default=1, help="images of each prompt (default: 1)")
    drawing.add_argument(
        "--guidance-scale",
        type=float,
        default=1.55,
        help="how closely to follow the prompt; 1: no guidance (default: 1.55)",
    )
    drawing.add_argument("--num-steps", type=int, default=50, help="denoising steps (default: 50)")
    drawing.add_argument(
        "--sampler",
        default="ddpm",
        metavar="NAME",
        help="ddpm, ddim or dpm-solver, which needs the fewest steps (default: ddpm)",
    )
    drawing.add_argument("--negative-prompt", help="what to keep away from")
    drawing.add_argument("--image-size", type=int, help="pixels a side (default: the size the model was trained with)")

    writing = parser.add_argument_group("writing")
    writing.add_argument("--text", action="store_true", help="write text instead of drawing")
    writing.add_argument("--chat", action="store_true", help="with --text: prompts are questions to a chat model")
    writing.add_argument("--max-new-tokens", type=int, default=64, help="default: 64")
    writing.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    writing.add_argument(
        "--top-p", type=float, default=1.0, help="choose among the likeliest tokens of this probability (default: 1)"
    )


def run(args: argparse.Namespace) -> int:
    _refuse_options_without_effect(args)
    if args.count < 1:
        raise ValueError(f"--count is {args.count}; it must be at least 1")
    return _write(args) if args.text else _draw(args)


def _refuse_options_without_effect(args: argparse.Namespace) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    drawing = ("output", "count", "guidance_scale", "num_steps", "sampler", "negative_prompt", "image_size")
    writing = ("chat", "max_new_tokens", "temperature", "top_p")
    for name in drawing if args.text else writing:
        if getattr(args, name) != parser.get_default(name):
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is about {'drawing; leave out' if args.text else 'text; add'} --text")


def _write(args: argparse.Namespace) -> int:
    from lmfusion.generation import generate_text

    answers = generate_text(
        load_model(args),
        args.prompts,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        batch_size=args.batch_size,
        chat=args.chat,
    )
    for prompt, answer in zip(args.prompts, answers, strict=True):
        print(answer.strip() if args.chat else prompt + answer)
    return 0


def _draw(args: argparse.Namespace) -> int:
    from lmfusion.generation import draw_images

    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written is told before the work
    prompts = [prompt for prompt in args.prompts for _ in range(args.count)]
    images = draw_images(
        load_model(args),
        prompts,
        guidance_scale=args.guidance_scale,
        num_steps=args.num_steps,
        sampler=args.sampler,
        seed=args.seed,
        negative_prompt=args.negative_prompt,
        batch_size=args.batch_size,
        image_size=args.image_size,
    )
    for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        path = folder / f"{i:04d}.png"
        partial = path.with_suffix(".png.partial")
        try:
            image.save(partial, format="PNG")
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"cannot write {path}: {error}; free some space or choose another --output") from error
        print(f"{path}\t{prompt}")
    return 0
