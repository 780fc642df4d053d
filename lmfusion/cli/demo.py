"""Chat with a model in the browser: text and images in one answer, with previews of the images.

    lmfusion demo
    lmfusion demo path/to/model --port 8080

Without MODEL it is the demo's own model: SmolLM2-135M, trained to generate and to read scikit-learn's handwritten
digits. If DIR/run holds no such model yet, it is made first: adapt, train, generate, caption, and check that the text
side did not change by a bit. This takes minutes on two CPU cores, and writes report.html, summary.json and digits.png
into DIR. The training run is in DIR/run: an interrupted run continues there; a finished one only generates, captions
and reports again.

    lmfusion demo --no-page
    lmfusion demo --no-page --output runs/other train.num_steps=1000
"""

import argparse
from pathlib import Path

from lmfusion.cli.loading import add_loading_options, load_model

MAX_BATCH = 8
"""Answers that the page generates at a time. It decides the size of the key-value cache."""
HELP = "chat with a model in the browser; without MODEL, train the demo's first"

EXAMPLES: tuple[str, ...] = (
    "Draw a seven, then say what you drew.",
    "Can you draw a three?",
    "What is the capital of France?",
)
"""Prompts that the demo's own model was trained for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder of a saved model (default: the demo's own)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to recipes/digits.yaml")

    page = parser.add_argument_group("page")
    page.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    page.add_argument("--port", type=int, default=7860, help="port to listen on; 0: any free one (default: 7860)")
    page.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name that browsers may use for the page, besides localhost and IP addresses; may be repeated",
    )
    add_loading_options(page)

    chain = parser.add_argument_group("the demo's own model")
    chain.add_argument(
        "--output", default="runs/demo", metavar="DIR", help="folder of the model and its report (default: runs/demo)"
    )
    chain.add_argument("--no-page", action="store_true", help="make the model, write the report, and exit")


def run(args: argparse.Namespace) -> int:
    if args.model is not None and "=" in args.model and not Path(args.model).exists():
        args.overrides = [args.model, *args.overrides]  # argparse takes the first positional for MODEL
        args.model = None
    if args.model is not None and (args.no_page or args.overrides):
        what = "--no-page" if args.no_page else f"{args.overrides[0]} (a change to the recipe)"
        raise ValueError(f"{what} needs the demo's own model; leave out {args.model}")
    if args.no_page:
        return _make(args)

    from lmfusion.serving.page.app import require_gradio

    require_gradio()
    from lmfusion.serving.lifecycle import bind, warn_if_public

    with bind(args.host, args.port) as listener:  # fails before minutes of training if the port is taken
        name, examples, prompt_mode = "lmfusion demo", EXAMPLES, "last_message"  # it was trained on single questions
        if args.model is not None:
            name, examples, prompt_mode = Path(args.model).resolve().name, (), "conversation"
        else:
            args.model = str(Path(args.output) / "run" / "model")
            has_model = (Path(args.model) / "config.json").is_file()
            if (args.overrides or not has_model) and (code := _make(args)):
                return code

        from lmfusion.generation.engine import Engine
        from lmfusion.generation.worker import EngineWorker
        from lmfusion.serving.page.app import serve_page

        warn_if_public(args.host, "the page")
        model = load_model(args)
        engine = Engine(model, max_batch=MAX_BATCH)
        print(engine.plan)
        worker = EngineWorker(engine)
        try:
            serve_page(
                worker,
                model,
                listener,
                host=args.host,
                name=name,
                examples=examples,
                prompt_mode=prompt_mode,
                allowed_hosts=[*args.allow_host, args.host],
            )
        finally:
            worker.close()
    return 0


def _make(args: argparse.Namespace) -> int:
    from lmfusion.experiments.demo.run import run_demo

    return 0 if run_demo(args.output, args.overrides)["text_identical"] else 1
