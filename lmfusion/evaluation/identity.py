"""Identifies a model, settings and software: digests, by which stored results are found again, and versions."""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmfusion.model.records import tensor_digests

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion


def model_digest(model: "LMFusion") -> str:
    """sha256 over every tensor with its dtype, the configuration, and the compute dtype."""
    tensors = tensor_digests(dict(model.state_dict()))
    dtypes = {name: str(tensor.dtype) for name, tensor in model.state_dict().items()}
    config = {key: value for key, value in model.config.to_dict().items() if "name_or_path" not in key}
    return values_digest([tensors, dtypes, str(model.compute_dtype), config])


def values_digest(values: Any) -> str:
    """sha256 of JSON values. Other values are hashed as their `str`."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def commit() -> str | None:
    """The commit of this package's checkout, with "+changes" if files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", str(Path(__file__).resolve())):  # installed inside the checkout of another project
        return None
    head = git("rev-parse", "HEAD")
    return f"{head}+changes" if head and git("status", "--porcelain", "--untracked-files=no") else head


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python and of each of `packages` that is installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
