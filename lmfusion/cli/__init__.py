"""The command `lmfusion`. Each subcommand is a module here with HELP, add_arguments(parser) and run(args) -> exit code.

Subcommands import heavy packages only when they run, so that `lmfusion --help` answers at once.
"""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from lmfusion.utils.printing import escape_lines

COMMANDS = (
    "adapt",
    "data",
    "encode",
    "train",
    "train-vae",
    "estimate",
    "generate",
    "caption",
    "eval",
    "serve",
    "verify",
    "ablate",
    "demo",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand named in `argv` (default: the process's arguments). Returns the exit code.

    Unusable input gives one line on stderr and exit code 2, Ctrl-C gives 130.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="lmfusion",
        description="Teach a frozen text LLM to generate and to describe images.",
        epilog="`lmfusion COMMAND --help` describes a command.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = arguments[0] if arguments and arguments[0] in COMMANDS else None
    for name in COMMANDS if chosen is None else (chosen,):
        module = importlib.import_module(f"lmfusion.cli.{name.replace('-', '_')}")
        subparser = subparsers.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    args, left_over = parser.parse_known_args(arguments)
    # argparse does not accept positionals on both sides of an option: `train RECIPE --max-steps 20 output=runs/short`
    if left_over and hasattr(args, "overrides") and not any(item.startswith("-") for item in left_over):
        args.overrides = [*args.overrides, *left_over]
    elif left_over:
        parser.error(f"unrecognized arguments: {' '.join(left_over)}")
    # transformers imports torchao if it is installed, which warns about kernels compiled for other builds
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"lmfusion: error: {escape_lines(str(error))}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"lmfusion: error: out of memory: {escape_lines(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lmfusion: interrupted", file=sys.stderr)
        return 130


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from lmfusion import __version__

        print(__version__)
        parser.exit()
