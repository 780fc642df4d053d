"""Is an optional package there? EngineRequest before anything slow, so that its absence costs no time."""

import importlib.util


def require(module: str, what: str, package: str) -> None:
    """Raise ValueError, with the way out, where `module` is not installed. what: that needs it. package: on PyPI."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{what} needs {package}, which is not installed; pip install {package}")
