"""Where does a model run?"""

import torch


def choose_device(name: str, option: str) -> torch.device:
    """The device called "auto" (a GPU where there is one), "cpu" or "cuda".

    Raises ValueError, naming the `option` it was asked by, where a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{option} is cuda, but PyTorch finds no GPU here; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
