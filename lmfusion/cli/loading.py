"""Arguments and loading that the commands for a trained model share."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmfusion.model.codec import Codec
    from lmfusion.model.configuration import LMFusionConfig
    from lmfusion.model.modeling import LMFusion
    from lmfusion.training.config import ModelConfig

DTYPES = ("float32", "bfloat16", "float16")


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --base, --codec-path, --device and --dtype."""
    parser.add_argument(
        "model", metavar="MODEL", help="folder of a model saved by `lmfusion adapt` or `lmfusion train`"
    )
    add_loading_options(parser)


def add_loading_options(parser: "argparse._ActionsContainer") -> None:
    """--base, --codec-path, --device and --dtype."""
    add_places(parser)
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="device of the model (default: a GPU if there is one)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: as saved)")


def add_places(parser: "argparse._ActionsContainer") -> None:
    """--base and --codec-path."""
    parser.add_argument(
        "--base",
        help="the base LLM, if it has moved since the model was saved: folder, GGUF file, or name on the hub",
    )
    parser.add_argument(
        "--codec-path", metavar="FOLDER", help="folder of the autoencoder, if it has moved since the model was saved"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --base, --codec-path, --device, --dtype, --batch-size and --seed."""
    add_loading_arguments(parser)
    parser.add_argument(
        "--batch-size", type=int, default=8, help="prompts at a time; changes only speed and memory (default: 8)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers (default: 0)")


def check_batch_size(args: argparse.Namespace) -> None:
    """Raise ValueError for a --batch-size below 1."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")


def load_model(args: argparse.Namespace) -> "LMFusion":
    """The model that the arguments name, on its device.

    Raises ValueError if a GPU is asked for and there is none, and whatever `LMFusion.from_pretrained` raises.
    """
    import torch

    from lmfusion.utils.devices import choose_device

    device = choose_device(args.device, "--device")  # before anything slow

    from lmfusion.model.modeling import LMFusion

    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    model = LMFusion.from_pretrained(args.model, base=args.base, dtype=dtype, codec_path=args.codec_path)
    return model.to(device)  # type: ignore[arg-type]


def read_without_weights(model: "ModelConfig") -> tuple["LMFusionConfig", "Codec", Any]:
    """Configuration, codec and tokenizer of the model that a recipe starts from, without the weights of the LLM.

    Raises ValueError if the LLM has no tokenizer, and whatever `LMFusion.from_llm` or `from_pretrained` raises.
    """
    from lmfusion.conversion import open_base
    from lmfusion.conversion.tokenizer import read_tokenizer, with_tokenizer_check
    from lmfusion.model.codec import load_codec
    from lmfusion.model.configuration import LMFusionConfig
    from lmfusion.model.saved_files import read_config
    from lmfusion.utils.recipes import resolve_path

    if model.adapted is not None:
        folder, config = read_config(Path(resolve_path(model.adapted)), model.codec_path)
        tokenizer = with_tokenizer_check(lambda: read_tokenizer(folder), config.text_config.vocab_size, str(folder))()
    else:
        assert model.base is not None
        base = open_base(resolve_path(model.base))
        config = LMFusionConfig(base.config, model.image, model.codec, model.diffusion, vlm_config=base.vlm_config)
        tokenizer = base.read_tokenizer()
    if tokenizer is None:
        raise ValueError("the base LLM must have a tokenizer to encode captions; put its tokenizer.json beside it")
    return config, load_codec(config.codec), tokenizer
