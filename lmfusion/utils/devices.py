"""Devices: choosing one, its name, and whether it multiplies bfloat16 fast."""

import platform

import torch


def choose_device(name: str, option: str) -> torch.device:
    """The device called "auto" (a GPU where there is one), "cpu" or "cuda".

    Raises ValueError, naming the `option` that was set, for "cuda" where there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{option} must be auto or cpu where PyTorch finds no GPU, got cuda")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def has_fast_bfloat16(device: str) -> bool:
    """Whether the device called "auto", "cpu" or "cuda" has instructions that multiply matrices of bfloat16.

    Where there is no GPU, "cuda" counts as one that has them.
    """
    if device == "cuda" and not torch.cuda.is_available():
        return True
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def device_name(device: torch.device) -> str:
    """A name of `device` for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
