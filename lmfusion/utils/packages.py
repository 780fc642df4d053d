"""Checks for optional packages before slow work begins, so that a missing one is reported at once."""

import importlib.util


def require(module: str, what: str, package: str) -> None:
    """Raise ValueError where `module` is not installed. what: the feature that needs it. package: its name on PyPI."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{what} needs {package}, which is not installed; pip install {package}")
