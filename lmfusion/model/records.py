"""What a model knows of its origin: the base it was made from, with a digest of each tensor, and its training."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lmfusion.conversion.names import to_llama
from lmfusion.utils.config_values import short_repr
from lmfusion.utils.hashing import tensor_sha256, values_sha256

DTYPES = ("float32", "float64", "bfloat16", "float16")
"""That weights may have."""


@dataclass
class BaseRecord:
    """The base LLM or VLM a model was made from."""

    name: str
    """Absolute path, or name on the hub."""
    dtype: str
    """The dtype in which its tensors were hashed, such as "float32"."""
    sha256: dict[str, str]
    """Of each frozen tensor, named as by `tensor_digests`."""
    may_differ: bool = False
    """Whether the text tower has been trainable since, so that its tensors may no longer be the base's."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"base.dtype must be one of {', '.join(DTYPES)}, got {short_repr(self.dtype)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def digest(self) -> str:
        """One sha256 for all tensors."""
        return values_sha256(self.sha256)

    @property
    def is_available(self) -> bool:
        """Whether the base is still at its path. Names on the hub count as available."""
        return not Path(self.name).is_absolute() or Path(self.name).exists()


@dataclass
class TrainingRecord:
    """How a model was trained; saved as training.json."""

    num_steps: int
    """Optimizer steps."""
    num_samples: int
    """Samples read for them, counted in every epoch."""
    batch_tokens: int
    """Tokens per optimizer step, padding included."""
    sources: list[str]
    """What was read, each with its weight."""
    learning_rate: float
    """After warm-up."""
    min_learning_rate: float
    """At the last step."""
    text_learning_rate_ratio: float
    """Learning rate of the text tower over that of the image tower; 0: it was frozen."""
    optimizer: str
    dtype: str
    """Of the activations."""
    ema_decay: float
    """Of the averaged weights, which are the saved ones; 0: the weights themselves are saved."""
    seed: int


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """sha256 of the bytes of each tensor. Names of the text tower's tensors become those of a Llama checkpoint.

    tensors: by file name, see `lmfusion.conversion.names`.
    """
    with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter's lock
        return dict(zip(map(to_llama, tensors), pool.map(tensor_sha256, tensors.values()), strict=True))


def changed_digests(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Names whose digests differ or that only one side has, in order."""
    return [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
