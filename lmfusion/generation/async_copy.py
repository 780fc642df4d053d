"""How do numbers get to the device and back while it is busy? Page-locked copies that nobody waits for too early."""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Tensor | Sequence[float] | Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """`values` (a CPU tensor, or numbers, which become float32) on `device`, without waiting for it."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float32)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class HostCopy:
    """A copy of a tensor on the host. It is under way from the start; `wait` waits for what came before it alone."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._copy = tensor
        if tensor.device.type == "cuda":
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._copy
