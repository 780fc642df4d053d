"""The running average of the trained weights, which samples, validation and exports use."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lmfusion.training.checkpoint import Slice, restore
from lmfusion.training.distributed import local_range, local_shard


class EMA:
    """Exponential moving averages of named float32 weights, on the same device; of a sharded weight, of the local rows.

    After step number `step` (from 0) an average moves by 1 - min(decay, (1 + step) / (10 + step)) towards its weight,
    so that the initial weights are forgotten quickly. With a decay of 0 there are no averages, and the weights
    themselves are used.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        assert all(weight.dtype == torch.float32 for weight in weights.values()), "bfloat16 is too coarse to average"
        self.decay = decay
        self._ranges = {name: local_range(weight) for name, weight in weights.items()}
        self._weights = {name: local_shard(weight.detach()) for name, weight in weights.items()}
        self._averages = {name: rows.clone() for name, rows in self._weights.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int, skip: Tensor | None = None) -> None:
        """Move the averages towards the weights after step number `step`; if `skip` (float32 []) is 1, not at all."""
        share: float | Tensor = 1 - min(self.decay, (1 + step) / (10 + step))
        if skip is not None:
            share = share * (1 - skip)
        for name, average in self._averages.items():
            average.lerp_(self._weights[name], share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model's weights are the averages. Do not train or save them there."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Swap weights and averages, one at a time: a copy of all weights may not fit into memory."""
        for name, average in self._averages.items():
            weight = self._weights[name].clone()
            self._weights[name].copy_(average)
            average.copy_(weight)

    def state_tensors(self) -> dict[str, Slice]:
        """The averages by the names of their weights, sharing their memory."""
        return {name: Slice(average, self._ranges[name]) for name, average in self._averages.items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `state_tensors` of an EMA of the same rows. Raises ValueError for any other."""
        restore(self.state_tensors(), tensors)
