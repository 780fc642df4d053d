"""Which model, where? The arguments and the loading that commands working with a trained model share."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmfusion.modeling import LMFusion

DTYPES = ("float32", "bfloat16", "float16")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --base, --device, --dtype, --batch-size and --seed."""
    parser.add_argument(
        "model", metavar="MODEL", help="folder of a model saved by `lmfusion adapt` or `lmfusion train`"
    )
    parser.add_argument("--base", help="where the base LLM is now, if it has moved since the model was saved")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU where there is one"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as they were saved")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="how many at a time; changes speed and memory only (default: 8)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")


def load_model(args: argparse.Namespace) -> "LMFusion":
    """The model that the arguments name, on its device.

    Raises ValueError where a GPU is asked for and there is none, and whatever `LMFusion.from_pretrained` raises.
    """
    import torch

    from lmfusion.devices import choose_device

    device = choose_device(args.device, "--device")  # before anything slow

    from lmfusion.modeling import LMFusion

    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    model = LMFusion.from_pretrained(args.model, base=args.base, dtype=dtype)
    return model.to(device)  # type: ignore[arg-type]
