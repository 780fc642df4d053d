"""Answer prompts with images, text, or both.

    lmfusion generate runs/digits/model "a handwritten seven" "a three" --output drawings
    lmfusion generate runs/digits/model "a three" --sampler dpm-solver --num-steps 20 --guidance-scale 2 --count 4
    lmfusion generate runs/digits/model "Draw a seven, then say what you drew." --chat
    lmfusion generate runs/digits/model "Which digit is this?" --chat --image photo.png
    lmfusion generate runs/shape-edits/model "make the circle blue" --image in.png --image-guidance-scale 1
    lmfusion generate runs/digits/model "The sky is" --text
    lmfusion generate runs/digits/model --settings drawings/0003.png --num-steps 100

A prompt is a caption, and an image of it is drawn; with --image it is an instruction, and what comes of that image is
drawn (docs/editing.md); with --chat it is said to the model, which answers with text and images as it decides; with
--text the model goes on writing from it.

Text appears as it is written. Each image is saved once it is finished, as DIR/0000.png, 0001.png, ... in the order in
which they are begun; a folder that has images is continued, nothing is overwritten. Each PNG holds prompt, seed and
settings, and --settings makes it again. The same seed gives the same images, whatever --batch-size. Ctrl-C keeps what
was finished.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmfusion.cli.answering import INTERRUPTED, run_to_the_end
from lmfusion.cli.loading import add_model_arguments, check_batch_size, load_model
from lmfusion.cli.pairs import json_pairs

if TYPE_CHECKING:
    from lmfusion.cli.progress import Request
    from lmfusion.generation import GenerationOptions, PromptLike

HELP = "answer prompts with images, text, or both"

CHAT_IMAGES = 4
"""Images of an answer at most, where nothing else is asked for."""
DEFAULT_OUTPUT = "drawings"
NUM_BAR_UPDATES = 20
"""How often the bar of an image moves on."""

_DRAWING = (
    "num_steps",
    "sampler",
    "guidance_scale",
    "image_guidance_scale",
    "guidance_interval",
    "guidance_rescale",
    "negative_prompt",
    "image_size",
    "preview_every",
    "output",
)
_WRITING = ("max_new_tokens", "temperature", "top_p", "top_k", "stop_strings")
_MIXING = ("max_images", "min_images")
_CHATTING = ("template_variables",)
_FLAGS = {"stop_strings": "--stop", "template_variables": "--template-variable"}
"""Options whose name is not that of the field of GenerationOptions."""

_RECORDED: dict[str, Any] = {"prompt": str, "prompt_images": list, "chat": bool, "index": int, "sampler": str}
"""Kinds of what --settings brings along, where GenerationOptions does not look at them itself."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    prompts = parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw, answer or go on from")
    prompts.required = False  # --settings brings one along
    parser.set_defaults(seed=None)  # --settings brings one along, too

    asking = parser.add_argument_group("what is asked for")
    asking.add_argument("--chat", action="store_true", help="prompts are said to a chat model; text and images answer")
    asking.add_argument("--text", action="store_true", help="write and do not draw; go on from the prompt, or --chat")
    asking.add_argument(
        "--image", action="append", metavar="FILE", help="an image before the text of each prompt; may be repeated"
    )
    asking.add_argument(
        "--template-variable",
        action="append",
        dest="template_variables",
        metavar="NAME=VALUE",
        help="what the chat template reads, such as enable_thinking=false, or today=2024-07-26 (values are JSON); may "
        "be repeated, with --chat",
    )
    asking.add_argument("--count", type=int, metavar="N", help="answers to each prompt (default: 1)")
    asking.add_argument(
        "--settings", metavar="PNG", help="do what this image was made with; further options change some of it"
    )

    drawing = parser.add_argument_group("drawing")
    drawing.add_argument("--output", metavar="DIR", help=f"folder of the images (default: {DEFAULT_OUTPUT})")
    drawing.add_argument(
        "--sampler", metavar="NAME", help="ddpm, ddim or dpm-solver, which needs the fewest steps (default: ddpm)"
    )
    drawing.add_argument("--num-steps", type=int, metavar="N", help="denoising steps (default: 50)")
    drawing.add_argument(
        "--guidance-scale",
        type=float,
        metavar="X",
        help="how closely to follow the text; 1: no guidance (default: 1.55)",
    )
    drawing.add_argument(
        "--image-guidance-scale",
        type=float,
        metavar="X",
        help="how closely to follow images in the prompt; 1: guide by the text alone (default: by both together)",
    )
    drawing.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide only between these shares of the noise levels (default: 0 1)",
    )
    drawing.add_argument(
        "--guidance-rescale",
        type=float,
        metavar="X",
        help="how much of the contrast guidance adds to take back, 0 to 1 (default: 0)",
    )
    drawing.add_argument("--negative-prompt", metavar="TEXT", help="what to keep away from")
    drawing.add_argument(
        "--image-size", type=int, metavar="N", help="pixels a side (default: the size the model was trained with)"
    )
    drawing.add_argument(
        "--preview-every", type=int, metavar="N", help="also save what becomes of an image, every N steps"
    )

    writing = parser.add_argument_group("writing")
    writing.add_argument("--max-new-tokens", type=int, metavar="N", help="of text, in an answer (default: 256)")
    writing.add_argument("--temperature", type=float, metavar="X", help="0 takes the likeliest token (default: 0)")
    writing.add_argument(
        "--top-p", type=float, metavar="X", help="choose among the likeliest tokens of this probability (default: 1)"
    )
    writing.add_argument("--top-k", type=int, metavar="N", help="choose among so many of the likeliest tokens; 0: all")
    writing.add_argument(
        "--stop", action="append", dest="stop_strings", metavar="TEXT", help="end the answer here; may be repeated"
    )
    writing.add_argument(
        "--max-images", type=int, metavar="N", help=f"images in an answer at most, with --chat (default: {CHAT_IMAGES})"
    )
    writing.add_argument("--min-images", type=int, metavar="N", help="images in an answer at least, with --chat")
    parser.add_argument("--verbose", action="store_true", help="say how memory is used, and what each answer took")


def run(args: argparse.Namespace) -> int:
    check_batch_size(args)
    requests = _repeated(args) if args.settings is not None else _asked(args)
    draws = requests[0].options.max_images > 0
    folder = Path(args.output or DEFAULT_OUTPUT)
    if draws:
        folder.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written is told before the work

    model = load_model(args)

    from lmfusion.cli.progress import Screen
    from lmfusion.generation import encode_prompt
    from lmfusion.generation.api import EngineRequest, engine_for

    once = {request.prompt: request for request in requests}  # whatever --count
    read = {
        prompt: encode_prompt(model, _prompt_of(request), request.chat, request.options.template_variables)
        for prompt, request in once.items()
    }
    asked = [EngineRequest(read[request.prompt], request.options, request.index) for request in requests]
    engine = engine_for(model, asked, args.batch_size)
    if args.verbose:
        print(engine.plan, file=sys.stderr)
    screen = Screen(requests, folder, keep_previews=args.preview_every is not None, verbose=args.verbose)
    try:
        is_finished = run_to_the_end(engine, asked, screen.show)
    finally:
        screen.close()
    if not is_finished:
        kept = f"; finished images are in {folder}: {len(screen.saved)}" if draws else ""
        print(f"lmfusion: interrupted{kept}", file=sys.stderr)
        return INTERRUPTED
    return 1 if screen.num_failed else 0


def _asked(args: argparse.Namespace) -> "list[Request]":
    """What PROMPT, --chat, --text, --image and --count ask for."""
    from lmfusion.cli.progress import Request

    if not args.prompts:
        raise ValueError("there is no PROMPT; say what to draw or to answer, or give --settings")
    count = 1 if args.count is None else args.count
    if count < 1:
        raise ValueError(f"--count is {count}; it must be at least 1")
    images = tuple(args.image or ())
    if args.text:
        mode: dict[str, Any] = {"max_images": 0}
    elif args.chat:
        mode = {"max_images": CHAT_IMAGES}
    else:
        mode = {"draw_first": True, "max_images": 1, "max_new_tokens": 0}
    options = _options(args, mode, chats=args.chat, mixes=args.chat and not args.text, sees=args.chat or bool(images))
    if count > 1 and options.max_images == 0 and options.temperature == 0:
        raise ValueError(f"--count is {count}, but without chance all answers are the same; add --temperature")
    prompts = [prompt for prompt in args.prompts for _ in range(count)]
    return [Request(prompt, images, args.chat, i, options) for i, prompt in enumerate(prompts)]


def _repeated(args: argparse.Namespace) -> "list[Request]":
    """What the image of --settings was made with. Its file may come from anywhere: nothing in it is taken on trust."""
    from lmfusion.cli.progress import Request
    from lmfusion.generation import GenerationOptions
    from lmfusion.images.png import read_settings

    brought = {"PROMPT": args.prompts, "--chat": args.chat, "--text": args.text, "--image": args.image}
    for flag, value in brought.items():
        if value:
            raise ValueError(f"{flag} is what --settings brings along; leave one of them out")
    if args.count is not None:
        raise ValueError("--settings makes one answer again; leave out --count, or change --seed for another one")
    settings = read_settings(args.settings)
    if settings is None:
        raise ValueError(f"{args.settings} holds no settings; give a PNG that lmfusion saved")
    for name, kind in _RECORDED.items():
        if name in settings and not isinstance(settings[name], kind):
            raise ValueError(f"the settings in {args.settings} cannot be used: {name} is {settings[name]!r:.80}")
    recorded = {item.name: settings[item.name] for item in fields(GenerationOptions) if item.name in settings}
    try:
        prompt, images, chat, index = (settings[name] for name in ("prompt", "prompt_images", "chat", "index"))
        GenerationOptions(**recorded)
    except KeyError as error:
        raise ValueError(f"the settings in {args.settings} lack {error}; give a PNG that this command saved") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"the settings in {args.settings} cannot be used: {error}") from error
    if index < 0 or not all(isinstance(image, str) for image in images):
        raise ValueError(
            f"the settings in {args.settings} cannot be used: index is {index}, prompt_images {images!r:.80}"
        )
    options = _options(args, recorded, chats=chat, mixes=chat, sees=chat or bool(images))
    return [Request(prompt, tuple(images), chat, index, options)]


def _options(
    args: argparse.Namespace, base: Mapping[str, Any], *, chats: bool, mixes: bool, sees: bool
) -> "GenerationOptions":
    """The options that are given, over those of `base`.

    chats: whether the prompt is a conversation. mixes: whether an answer may hold text and images. sees: whether there
    are images before one that is drawn.

    Raises ValueError for an option that has no effect here.
    """
    from lmfusion.generation import GenerationOptions

    names = (*_DRAWING, *_WRITING, *_MIXING, *_CHATTING, "seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "template_variables" in given:
        pairs = given["template_variables"]
        given["template_variables"] = json_pairs(
            pairs, "--template-variable", "NAME=VALUE, such as enable_thinking=false"
        )
    values = {**base, **given}
    values.pop("output", None)
    options = GenerationOptions(**values)
    rules = (
        (_DRAWING, options.max_images > 0, "is about drawing; leave out --text, or raise --max-images"),
        (
            _WRITING,
            options.max_new_tokens > 0 and base.get("max_new_tokens") != 0,
            "is about text; add --text or --chat",
        ),
        (_CHATTING, chats, "is about conversations; add --chat"),
        (_MIXING, mixes, "is about answers of text and images; add --chat and leave out --text"),
        (("top_p", "top_k"), options.temperature > 0, "chooses among what chance may take; add --temperature"),
        (
            ("guidance_interval", "guidance_rescale", "negative_prompt"),
            options.is_guided,
            "is about guidance; raise --guidance-scale above 1",
        ),
        (("image_guidance_scale",), sees, "is about images in the prompt; add --image FILE"),
    )
    for affected, has_effect, why in rules:
        for name in affected:
            if name in given and not has_effect:
                raise ValueError(f"{_FLAGS.get(name, '--' + name.replace('_', '-'))} {why}")
    if options.max_images and sys.stderr.isatty() and not options.preview_every:
        options = replace(options, preview_every=max(1, options.num_steps // NUM_BAR_UPDATES))
    return options


def _prompt_of(request: "Request") -> "PromptLike":
    images = [*map(Path, request.images)]
    words = [request.prompt] if request.prompt or not images else []
    # What is to become of an image stands before it, as in training; what is said of one, behind it
    parts: list[str | Path] = [*words, *images] if request.is_drawing else [*images, *words]
    if request.chat:
        return [{"role": "user", "content": parts}]
    # As a single text it is tokenised as the base LLM would, in a list as captions are in training
    return parts if request.images or request.is_drawing else request.prompt
