"""Where does a model run, and in what?"""

import platform

import torch


def choose_device(name: str, option: str) -> torch.device:
    """The device called "auto" (a GPU where there is one), "cpu" or "cuda".

    Raises ValueError, naming the `option` it was asked by, where a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{option} is cuda, but PyTorch finds no GPU here; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def has_fast_bfloat16(device: str) -> bool:
    """Whether the device called "auto", "cpu" or "cuda" has instructions that multiply matrices of bfloat16.

    A GPU that is not here counts as one that has.
    """
    if device == "cuda" and not torch.cuda.is_available():
        return True
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def device_name(device: torch.device) -> str:
    """What to call `device` beside a figure."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
