"""A running average of the trained weights: smoother than the weights themselves, so samples and exports use it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """Exponential moving average of named weights, kept in float32 beside them.

    After step number `step` (from 0) an average moves by 1 - min(decay, (1 + step) / (10 + step)) towards its weight,
    so that the start is forgotten quickly. A decay of 0 follows the weights exactly.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._weights = weights
        self._averages = {name: weight.detach().float().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights that step number `step` left."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [self._weights[name].detach().float() for name in self._averages]
        torch._foreach_lerp_(list(self._averages.values()), weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averages for weights. They may not be trained there."""
        with torch.no_grad():
            kept = {name: weight.detach().clone() for name, weight in self._weights.items()}
            _copy(self._averages, self._weights)
        try:
            yield
        finally:
            with torch.no_grad():
                _copy(kept, self._weights)

    def state_tensors(self) -> dict[str, Tensor]:
        return self._averages

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        _copy(tensors, self._averages)


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
