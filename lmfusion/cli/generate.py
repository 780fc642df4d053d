"""Answer prompts with images, text, or both.

    lmfusion generate runs/digits/model "a handwritten seven" "a three" --output drawings
    lmfusion generate runs/digits/model "a three" --sampler dpm-solver --num-steps 20 --guidance-scale 2 --count 4
    lmfusion generate runs/digits/model "Draw a seven, then say what you drew." --chat
    lmfusion generate runs/digits/model "Which digit is this?" --chat --image photo.png
    lmfusion generate runs/shape-edits/model "make the circle blue" --image in.png --image-guidance-scale 1
    lmfusion generate runs/digits/model "The sky is" --text
    lmfusion generate runs/digits/model --settings drawings/0003.png --num-steps 100

A prompt is a caption, and its image is generated. With --image the prompt is an instruction that edits the image
(docs/guides.md). With --chat it is a message, which the model answers with text and images as it decides. With --text
the model continues the prompt.

Text is printed as it is generated. Each image is saved as soon as it is finished, as DIR/0000.png, 0001.png, ... in the
order in which they start; numbers continue after the images of the folder, and nothing is overwritten. Each PNG holds
prompt, seed and settings, and --settings generates it again. --preview-every also saves the previews. The same seed
gives the same images, whatever --batch-size. Ctrl-C keeps the images that are finished.
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
    from lmfusion.cli.progress import CommandRequest
    from lmfusion.generation import GenerationOptions, PromptLike

HELP = "answer prompts with images, text, or both"

CHAT_IMAGES = 4
"""Most images of an answer with --chat, by default."""
DEFAULT_OUTPUT = "drawings"
NUM_BAR_UPDATES = 20
"""How often the progress bar of an image is updated."""

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
    prompts = parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to generate, answer or continue")
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
    requests = _from_settings(args) if args.settings is not None else _from_arguments(args)
    has_images = requests[0].options.max_images > 0
    folder = Path(args.output or DEFAULT_OUTPUT)
    if has_images:
        folder.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written is an error before the work

    model = load_model(args)

    from lmfusion.cli.progress import ProgressDisplay
    from lmfusion.generation import encode_prompt
    from lmfusion.generation.api import EngineRequest, engine_for

    once = {request.prompt: request for request in requests}  # each prompt is encoded once, whatever --count
    encoded = {
        prompt: encode_prompt(model, _prompt_of(request), request.chat, request.options.template_variables)
        for prompt, request in once.items()
    }
    engine_requests = [EngineRequest(encoded[r.prompt], r.options, r.index) for r in requests]
    engine = engine_for(model, engine_requests, args.batch_size)
    if args.verbose:
        print(engine.plan, file=sys.stderr)
    display = ProgressDisplay(requests, folder, keep_previews=args.preview_every is not None, verbose=args.verbose)
    try:
        is_finished = run_to_the_end(engine, engine_requests, display.show)
    finally:
        display.close()
    if not is_finished:
        kept = f"; finished images are in {folder}: {len(display.saved)}" if has_images else ""
        print(f"lmfusion: interrupted{kept}", file=sys.stderr)
        return INTERRUPTED
    return 1 if display.num_failed else 0


def _from_arguments(args: argparse.Namespace) -> "list[CommandRequest]":
    """The requests of PROMPT, --chat, --text, --image and --count."""
    from lmfusion.cli.progress import CommandRequest

    if not args.prompts:
        raise ValueError("a PROMPT must be given; write what to generate, answer or continue, or give --settings")
    count = 1 if args.count is None else args.count
    if count < 1:
        raise ValueError(f"--count must be at least 1, got {count}")
    images = tuple(args.image or ())
    if args.text:
        mode: dict[str, Any] = {"max_images": 0}
    elif args.chat:
        mode = {"max_images": CHAT_IMAGES}
    else:
        mode = {"draw_first": True, "max_images": 1, "max_new_tokens": 0}
    options = _options(
        args,
        mode,
        is_chat=args.chat,
        is_mixed=args.chat and not args.text,
        has_images=args.chat or bool(images),
    )
    if count > 1 and options.max_images == 0 and options.temperature == 0:
        raise ValueError(f"--count must be 1 without random sampling, got {count} equal answers; add --temperature")
    prompts = [prompt for prompt in args.prompts for _ in range(count)]
    return [CommandRequest(prompt, images, args.chat, i, options) for i, prompt in enumerate(prompts)]


def _from_settings(args: argparse.Namespace) -> "list[CommandRequest]":
    """The request of the image in --settings. The file may come from anywhere, so everything in it is checked."""
    from lmfusion.cli.progress import CommandRequest
    from lmfusion.generation import GenerationOptions
    from lmfusion.images.png import read_settings

    fixed = {"PROMPT": args.prompts, "--chat": args.chat, "--text": args.text, "--image": args.image}
    for flag, value in fixed.items():
        if value:
            raise ValueError(f"{flag} must not be given with --settings, which contains it; leave one of them out")
    if args.count is not None:
        raise ValueError(
            "--count must not be given with --settings; leave out --count, or change --seed for another image"
        )
    settings = read_settings(args.settings)
    if settings is None:
        raise ValueError(f"{args.settings} must hold settings, got none; give a PNG that lmfusion saved")
    for name, kind in _RECORDED.items():
        if name in settings and not isinstance(settings[name], kind):
            raise ValueError(
                f"the settings in {args.settings} cannot be used: {name} must be a {kind.__name__}, "
                f"got {settings[name]!r:.80}"
            )
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
            f"the settings in {args.settings} cannot be used: index must be at least 0 and prompt_images texts, "
            f"got {index} and {images!r:.80}"
        )
    options = _options(args, recorded, is_chat=chat, is_mixed=chat, has_images=chat or bool(images))
    return [CommandRequest(prompt, tuple(images), chat, index, options)]


def _options(
    args: argparse.Namespace, base: Mapping[str, Any], *, is_chat: bool, is_mixed: bool, has_images: bool
) -> "GenerationOptions":
    """The options of the command line, over those of `base`.

    is_chat: whether the prompt is a conversation. is_mixed: whether an answer may hold text and images. has_images:
    whether images come before the generated one.

    Raises ValueError for an option that would have no effect.
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
        (_of("conversation"), is_chat, "a conversation; add --chat"),
        (_of("answer"), is_mixed, "an answer of text and images; add --chat and leave out --text"),
        (("top_p", "top_k"), options.temperature > 0, "random sampling; add --temperature"),
        (
            ("guidance_interval", "guidance_rescale", "negative_prompt"),
            options.is_guided,
            "guidance; raise --guidance-scale above 1",
        ),
        (("image_guidance_scale",), has_images, "images in the prompt; add --image FILE"),
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


def _prompt_of(request: "CommandRequest") -> "PromptLike":
    images = [*map(Path, request.images)]
    words = [request.prompt] if request.prompt or not images else []
    # An instruction stands before its image, as in training, and a question behind it
    parts: list[str | Path] = [*words, *images] if request.is_image_only else [*images, *words]
    if request.chat:
        return [{"role": "user", "content": parts}]
    # A single text is tokenized as by the base LLM, a list as captions are in training
    return parts if request.images or request.is_image_only else request.prompt
