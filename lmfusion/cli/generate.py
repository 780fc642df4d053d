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
from lmfusion.generation.options import OPTIONS, Group

if TYPE_CHECKING:
    from lmfusion.cli.progress import Request
    from lmfusion.generation import GenerationOptions, PromptLike

HELP = "answer prompts with images, text, or both"

CHAT_IMAGES = 4
"""Images of an answer at most, where nothing else is asked for."""
DEFAULT_OUTPUT = "drawings"
NUM_BAR_UPDATES = 20
"""How often the bar of an image moves on."""

_PLACEHOLDERS: dict[str, Any] = {
    "sampler": "NAME",
    "template_variables": "NAME=VALUE",
    "guidance_interval": ("LOW", "HIGH"),
}
"""What the help shows in place of a value, where that is not N, X or TEXT."""

_RECORDED: dict[str, Any] = {"prompt": str, "prompt_images": list, "chat": bool, "index": int, "sampler": str}
"""Types of the settings in a PNG that GenerationOptions does not check itself."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    prompts = parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw, to answer or to continue")
    prompts.required = False  # --settings has a prompt
    parser.set_defaults(seed=None)  # --settings has a seed, too

    asking = parser.add_argument_group("what to generate")
    asking.add_argument("--chat", action="store_true", help="prompts are messages to a chat model, which answers")
    asking.add_argument(
        "--text", action="store_true", help="write text only: continue the prompt, or answer with --chat"
    )
    asking.add_argument(
        "--image", action="append", metavar="FILE", help="an image before the text of each prompt; may be repeated"
    )
    _add_options(asking, "conversation")
    asking.add_argument("--count", type=int, metavar="N", help="answers to each prompt (default: 1)")
    asking.add_argument(
        "--settings", metavar="PNG", help="use the settings that this image was made with; other options change them"
    )
    _add_options(asking, "answer")

    images = parser.add_argument_group("images")
    images.add_argument("--output", metavar="DIR", help=f"folder of the images (default: {DEFAULT_OUTPUT})")
    _add_options(images, "image")
    _add_options(parser.add_argument_group("text"), "text")
    parser.add_argument("--verbose", action="store_true", help="show the memory plan and what each answer took")


def _add_options(arguments: "argparse._ArgumentGroup", group: Group) -> None:
    """The options of a group in the table of options. The default is None, which leaves the value to the table."""
    for option in OPTIONS.values():
        if option.group != group or option.flag is None:
            continue
        kind = option.value_type
        default = f"{CHAT_IMAGES} with --chat" if option.name == "max_images" else option.default
        has_default = default not in (None, (), {})
        text = option.help
        if isinstance(default, (int, float, tuple)):
            default = " ".join(f"{number:g}" for number in (default if isinstance(default, tuple) else (default,)))
        if kind in (list, dict):
            how: dict[str, Any] = {"action": "append"}
            text += "; may be repeated"
        elif kind is tuple:
            how = {"nargs": 2, "type": float}
        else:
            how = {"type": kind}
        arguments.add_argument(
            option.flag,
            dest=option.name,
            metavar=_PLACEHOLDERS.get(option.name, {int: "N", float: "X"}.get(kind, "TEXT")),
            help=(f"{text} (default: {default})" if has_default else text).replace("%", "%%"),
            **how,
        )


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

    options_given = [name for name, option in OPTIONS.items() if option.flag is not None]
    given = {name: getattr(args, name) for name in (*options_given, "output") if getattr(args, name) is not None}
    if "template_variables" in given:
        pairs = given["template_variables"]
        given["template_variables"] = json_pairs(
            pairs, "--template-variable", "NAME=VALUE, such as enable_thinking=false"
        )
    values = {**base, **given}
    values.pop("output", None)
    options = GenerationOptions(**values)
    has_text = options.max_new_tokens > 0 and base.get("max_new_tokens") != 0
    rules = (
        (
            (*_of("image"), "output"),
            options.max_images > 0,
            "images in the answer; leave out --text, or raise --max-images",
        ),
        (_of("text"), has_text, "text in the answer; add --text or --chat"),
        (_of("conversation"), chats, "a conversation; add --chat"),
        (_of("answer"), mixes, "an answer of text and images; add --chat and leave out --text"),
        (("top_p", "top_k"), options.temperature > 0, "random sampling; add --temperature"),
        (
            ("guidance_interval", "guidance_rescale", "negative_prompt"),
            options.is_guided,
            "guidance; raise --guidance-scale above 1",
        ),
        (("image_guidance_scale",), sees, "images in the prompt; add --image FILE"),
    )
    for affected, has_effect, need in rules:
        for name in affected:
            if name in given and not has_effect:
                raise ValueError(f"{'--output' if name == 'output' else OPTIONS[name].flag} needs {need}")
    if options.max_images and sys.stderr.isatty() and not options.preview_every:
        options = replace(options, preview_every=max(1, options.num_steps // NUM_BAR_UPDATES))
    return options


def _of(group: Group) -> list[str]:
    return [name for name, option in OPTIONS.items() if option.group == group]


def _prompt_of(request: "Request") -> "PromptLike":
    images = [*map(Path, request.images)]
    words = [request.prompt] if request.prompt or not images else []
    # What is to become of an image stands before it, as in training; what is said of one, behind it
    parts: list[str | Path] = [*words, *images] if request.is_drawing else [*images, *words]
    if request.chat:
        return [{"role": "user", "content": parts}]
    # As a single text it is tokenised as the base LLM would, in a list as captions are in training
    return parts if request.images or request.is_drawing else request.prompt
