"""Compare the text side of a saved model with its base LLM, bit for bit.

Prints how many text tensors have the sha256 of the base's, and whether the logits of a few prompts are the same to the
last bit. Exit code: 0 if everything is identical, 1 if something differs, 2 if the model cannot be loaded, for example
because its base LLM has changed.
"""

import argparse

from lmfusion.cli.loading import add_places

HELP = "check that the text side of a model equals its base LLM, bit for bit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="folder of a saved model")
    add_places(parser)


def run(args: argparse.Namespace) -> int:
    from lmfusion.model.verification import verify

    verification = verify(args.path, args.base, args.codec_path)
    print(verification.table())
    return 0 if verification.text_identical else 1
