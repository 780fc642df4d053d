"""lmfusion: a frozen text LLM that learns to draw. Names are loaded when first used, so `import lmfusion` is quick.

To load saved models with transformers' AutoConfig and AutoModel, `import lmfusion.hub` first.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "LMFusion": "lmfusion.model.modeling",
    "LMFusionOutput": "lmfusion.model.losses",
    "LMFusionConfig": "lmfusion.model.configuration",
    "ImageTowerConfig": "lmfusion.model.configuration",
    "CodecConfig": "lmfusion.model.codec",
    "PatchCoderConfig": "lmfusion.model.patch_coder",
    "DiffusionConfig": "lmfusion.model.diffusion",
    "Batch": "lmfusion.model.batch",
    "verify": "lmfusion.model.verification",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
