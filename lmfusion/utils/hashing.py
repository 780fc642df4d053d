"""sha256 digests of files, of values that JSON knows, and of tensors."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmfusion.utils.files import name_os_errors


def file_sha256(path: Path) -> str:
    """Digest of the bytes of a file."""
    with name_os_errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def values_sha256(values: Any) -> str:
    """Digest of JSON values, whatever the order of their keys. Other values count as their text."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """Digest of a tensor's bytes. Its shape and dtype do not count."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest()  # type: ignore[arg-type]
