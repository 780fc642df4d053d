"""Which model and which settings was it? Digests, so that stored answers are never those of others."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

from lmfusion.serialization import digests

if TYPE_CHECKING:
    from lmfusion.modeling import LMFusion


def model_digest(model: "LMFusion") -> str:
    """One sha256 for every tensor, with its dtype, the configuration and the dtype that is computed in."""
    tensors = digests(dict(model.state_dict()))
    dtypes = {name: str(tensor.dtype) for name, tensor in model.state_dict().items()}
    config = {key: value for key, value in model.config.to_dict().items() if "name_or_path" not in key}
    return values_digest([tensors, dtypes, str(model.compute_dtype), config])


def values_digest(values: Any) -> str:
    """sha256 of values that JSON knows; others count as their text."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
