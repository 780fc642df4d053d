"""Which model, settings and software was it? Digests, so that stored answers are never those of others; versions."""

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
    """One sha256 for every tensor, with its dtype, the configuration and the dtype that is computed in."""
    tensors = tensor_digests(dict(model.state_dict()))
    dtypes = {name: str(tensor.dtype) for name, tensor in model.state_dict().items()}
    config = {key: value for key, value in model.config.to_dict().items() if "name_or_path" not in key}
    return values_digest([tensors, dtypes, str(model.compute_dtype), config])


def values_digest(values: Any) -> str:
    """sha256 of values that JSON knows; others count as their text."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def commit() -> str | None:
    """Of the checkout that this package is in, with "+changes" if its files differ from it; None outside of one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", str(Path(__file__).resolve())):  # a package installed inside somebody else's checkout
        return None
    head = git("rev-parse", "HEAD")
    return f"{head}+changes" if head and git("status", "--porcelain", "--untracked-files=no") else head


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python and of those of `packages` that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
