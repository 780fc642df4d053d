"""Numbers that are not finite: how a request ends whose text or image has come to them."""

from collections.abc import Sequence

import torch
from torch import Tensor


class NotFiniteError(ValueError):
    """A request has come to NaN or infinity. It ends; others go on."""


def text_error() -> NotFiniteError:
    return NotFiniteError(
        "the next token cannot be chosen, since its logits are not finite; the model's weights, or an image before it, "
        "hold NaN or infinity, or the model's dtype is too narrow for it: try float32"
    )


def image_error(index: int, sampler: object, num_steps: int) -> NotFiniteError:
    name = sampler if isinstance(sampler, str) else type(sampler).__name__
    return NotFiniteError(
        f"image {index} is not finite: sampler {name} with num_steps {num_steps}, a callback, or the model's weights "
        "gave NaN or infinity; try more steps or another sampler"
    )


def are_finite(*tensors: Sequence[Tensor] | Tensor) -> Tensor:
    """bool [n] on the device, of n things that each of `tensors` holds: whether all of their numbers are finite."""
    flags = [torch.stack([x.isfinite().all() for x in tensor]) for tensor in tensors]
    return torch.stack(flags).all(dim=0)
