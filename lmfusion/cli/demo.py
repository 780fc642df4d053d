"""Open a page in the browser to talk to a model: text and pictures in one answer, pictures while they appear.

    lmfusion demo
    lmfusion demo path/to/model --port 8080

Without MODEL it is the demo's own: SmolLM2-135M, taught to draw and read scikit-learn's handwritten digits. Where
DIR/run holds no such model yet, it is made first: adapt, train, draw, caption, and check that the text side did not
change by a bit. That takes minutes on two CPU cores, and writes report.html, summary.json and digits.png into DIR. The
training run lies in DIR/run: an interrupted one continues there, a finished one only draws, captions and reports again.

    lmfusion demo --no-page
    lmfusion demo --no-page --output runs/other train.num_steps=1000
"""

import argparse
from pathlib import Path

from lmfusion.cli.loading import add_loading_options, load_model

MAX_BATCH = 8
"""Answers made at a time on the page: it decides how large the key-value cache is."""
HELP = "talk to a model in the browser; without one, make the demo's first"

EXAMPLES: tuple[str, ...] = (
    "Draw a seven, then say what you drew.",
    "Can you draw a three?",
    "What is the capital of France?",
)
"""What the demo's own model has been taught."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder of a saved model (default: the demo's own)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to recipes/digits.yaml")

    page = parser.add_argument_group("page")
    page.add_argument("--host", default="127.0.0.1", help="to listen on (default: 127.0.0.1, this machine alone)")
    page.add_argument("--port", type=int, default=7860, help="0: any that is free (default: 7860)")
    page.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name by which browsers may call the page, besides localhost and IP addresses; may be repeated",
    )
    add_loading_options(page)

    chain = parser.add_argument_group("the demo's own model")
    chain.add_argument("--output", default="runs/demo", metavar="DIR", help="where it is (default: runs/demo)")
    chain.add_argument("--no-page", action="store_true", help="make it, write the report, and end")


def run(args: argparse.Namespace) -> int:
    if args.model is not None and "=" in args.model and not Path(args.model).exists():
        args.overrides = [args.model, *args.overrides]  # argparse takes the first word for MODEL
        args.model = None
    if args.model is not None and (args.no_page or args.overrides):
        what = "--no-page" if args.no_page else f"{args.overrides[0]} (a change to the recipe)"
        raise ValueError(f"{what} is about the demo's own model; leave out {args.model}")
    if args.no_page:
        return _make(args)

    from lmfusion.serving.page.app import require_gradio

    require_gradio()
    from lmfusion.serving.lifecycle import bind, warn_if_public

    with bind(args.host, args.port) as listener:  # a port that is taken is told before minutes of training
        name, examples, prompt_mode = "lmfusion demo", EXAMPLES, "last_message"  # it was taught single questions
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
