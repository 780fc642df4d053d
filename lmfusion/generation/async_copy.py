"""Copies between host and device that do not stop the host: uploads, and downloads that are awaited when needed."""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Tensor | Sequence[float] | Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """`values` (a CPU tensor, or numbers, which become float32) on `device`, without waiting for the device."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float32)
    # From pageable memory `non_blocking` would wait for the device all the same
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class HostCopy:
    """A copy of a tensor on the host, begun at once.

    `wait` blocks until the copy is complete, but not for work that was queued on the device after it. Between the two
    calls the host is free to queue more work, so call `wait` as late as possible.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._copy = tensor
        if tensor.device.type == "cuda":
            # The copy is asynchronous only into page-locked memory
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> Tensor:
        """The tensor on the host. Before this returns, the memory may hold anything."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy
