"""Serve a model over HTTP: OpenAI's chat API, with images in and out. See docs/serving.md.

    lmfusion serve runs/demo/run/model
    lmfusion serve runs/demo/run/model --port 9000 --max-waiting 16 --default sampler=dpm-solver --default num_steps=20

    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"messages": [{"role": "user", "content": "Draw a seven, then say what you drew."}]}'

It listens on this machine only, unless --host says otherwise. If others can reach it, require a key: it is read from
the environment variable LMFUSION_API_KEY or from --api-key-file. After Ctrl-C or SIGTERM running answers may finish.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lmfusion.cli.loading import add_loading_arguments, load_model
from lmfusion.cli.pairs import json_pairs

if TYPE_CHECKING:
    from lmfusion.generation.options import Limits
    from lmfusion.model.modeling import LMFusion

HELP = "serve a model over HTTP with OpenAI's chat API"
KEY_VARIABLE = "LMFUSION_API_KEY"
MEBI = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_loading_arguments(parser)
    parser.add_argument("--name", help="name of the model in requests (default: the name of its folder)")
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja template to use instead of the tokenizer's own, or if it has none",
    )
    parser.add_argument(
        "--default",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="value for requests that leave the field out, such as num_steps=20; may be repeated",
    )

    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    network.add_argument("--port", type=int, default=8000, help="port to listen on; 0: any free one (default: 8000)")
    network.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name that clients may use for the server, besides localhost and IP addresses; may be repeated",
    )
    network.add_argument("--api-key-file", metavar="FILE", help=f"file with the API key, instead of {KEY_VARIABLE}")
    network.add_argument(
        "--shutdown-seconds",
        type=float,
        default=10,
        metavar="S",
        help="seconds that running answers may take after SIGTERM (default: 10)",
    )

    capacity = parser.add_argument_group("capacity")
    capacity.add_argument("--max-batch", type=int, default=64, help="answers generated at a time (default: 64)")
    capacity.add_argument(
        "--max-waiting", type=int, default=64, help="requests in the queue; more get a 429 (default: 64)"
    )
    capacity.add_argument(
        "--cache-slots",
        type=int,
        metavar="N",
        help="slots of the key-value cache, one per token (default: planned from the free memory)",
    )

    limits = parser.add_argument_group("limits of one request")
    limits.add_argument(
        "--max-tokens", type=int, default=4096, metavar="N", help="text tokens of an answer (default: 4096)"
    )
    limits.add_argument("--max-images", type=int, default=16, metavar="N", help="images of an answer (default: 16)")
    limits.add_argument(
        "--max-num-steps", type=int, default=1000, metavar="N", help="denoising steps of an image (default: 1000)"
    )
    limits.add_argument(
        "--max-image-size",
        type=int,
        default=2048,
        metavar="N",
        help="pixels per side of an image of an answer (default: 2048)",
    )
    limits.add_argument(
        "--max-prompt-images", type=int, default=64, metavar="N", help="images of a prompt (default: 64)"
    )
    limits.add_argument(
        "--max-prompt-megapixels",
        type=float,
        default=16,
        metavar="X",
        help="megapixels of an image of a prompt (default: 16)",
    )
    limits.add_argument(
        "--max-body-mb", type=float, default=16, metavar="X", help="size of a request in MiB (default: 16)"
    )


def run(args: argparse.Namespace) -> int:
    try:
        from lmfusion.serving.http.app import build_app
        from lmfusion.serving.http.requests import RequestLimits, RequestParser
        from lmfusion.serving.lifecycle import bind, run_server, url_of, warn_if_public
    except ImportError as error:
        missing = f"`lmfusion serve` needs fastapi and uvicorn ({error.name} is not installed)"
        raise ValueError(f'{missing}; pip install -e ".[serve]"') from None
    from lmfusion.generation.engine import Engine
    from lmfusion.generation.previews import preview_map
    from lmfusion.generation.worker import EngineWorker

    # Everything that can be wrong is checked before the model is loaded
    if args.shutdown_seconds < 0:
        raise ValueError(f"--shutdown-seconds must be at least 0, got {args.shutdown_seconds}")
    limits = RequestLimits(
        max_body_bytes=round(args.max_body_mb * MEBI),
        max_image_pixels=round(args.max_prompt_megapixels * MEBI),
        generation=_limits(args),
    )
    defaults = json_pairs(args.default, "--default", "FIELD=VALUE, such as num_steps=20")
    api_key = _api_key(args.api_key_file)
    template = None if args.chat_template is None else Path(args.chat_template).read_text(encoding="utf-8")
    with bind(args.host, args.port) as listener:
        key = "with the API key" if api_key else f"WITHOUT ANY KEY (set {KEY_VARIABLE} or --api-key-file)"
        warn_if_public(args.host, f"the model {key}")
        model = load_model(args)
        _require_chat(model, template)
        name = args.name or Path(args.model).resolve().name
        parser = RequestParser(model, name, limits, defaults)
        preview_map(model.codec)  # which may take seconds, before anybody waits for it
        engine = Engine(model, num_slots=args.cache_slots, max_batch=args.max_batch, limits=limits.generation)
        worker = EngineWorker(engine, max_waiting=args.max_waiting)
        app = build_app(worker, parser, api_key=api_key, allowed_hosts=[*args.allow_host, args.host])
        print(engine.plan)
        run_server(
            app,
            worker,
            listener,
            shutdown_seconds=args.shutdown_seconds,
            on_ready=lambda: print(f"serving {name} at {url_of(args.host, listener)} (Ctrl-C ends it)", flush=True),
        )
    print("lmfusion: the server has ended", file=sys.stderr)
    return 0


def _limits(args: argparse.Namespace) -> "Limits":
    from lmfusion.generation.options import Limits

    given = {
        "max_new_tokens": args.max_tokens,
        "max_images": args.max_images,
        "max_num_steps": args.max_num_steps,
        "max_image_size": args.max_image_size,
        "max_prompt_images": args.max_prompt_images,
    }
    for name, value in given.items():
        if value < 0:
            option = "--max-tokens" if name == "max_new_tokens" else f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} must be at least 0, got {value}")
    return Limits(**given)


def _api_key(path: str | None) -> str | None:
    """The API key. It is not a command-line value, which every user of the machine could read in the process list."""
    key = os.environ.get(KEY_VARIABLE) if path is None else Path(path).read_text(encoding="utf-8")
    if key is None:
        return None
    key = key.strip()
    if not (key and key.isascii() and key.isprintable()):
        where = KEY_VARIABLE if path is None else path
        raise ValueError(f"the API key in {where} must be printable ASCII and not empty, or headers cannot hold it")
    return key


def _require_chat(model: "LMFusion", template: str | None) -> None:
    if model.tokenizer is None:
        raise ValueError("the model must have a tokenizer; adapt it from a checkpoint with one")
    if template is not None:
        model.tokenizer.chat_template = template
    if not getattr(model.tokenizer, "chat_template", None):
        raise ValueError(
            "the model's tokenizer must have a chat template, or it was not trained to chat; serve a chat model, or "
            "give --chat-template FILE"
        )
