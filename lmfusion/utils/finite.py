"""Finds NaN and infinity in logits and images, and makes the errors for requests that have them."""

from collections.abc import Sequence

import torch
from torch import Tensor


class NotFiniteError(ValueError):
    """The logits or the image of a request contain NaN or infinity. It ends; other requests continue."""


def text_error() -> NotFiniteError:
    return NotFiniteError(
        "the next token cannot be chosen, because its logits are not finite: the model's weights or an earlier image "
        "contain NaN or infinity, or the model's dtype is too narrow; try float32"
    )


def image_error(index: int, sampler: object, num_steps: int) -> NotFiniteError:
    name = sampler if isinstance(sampler, str) else type(sampler).__name__
    return NotFiniteError(
        f"image {index} is not finite: sampler {name} with num_steps {num_steps}, a callback, or the model's weights "
        "gave NaN or infinity; try more steps or another sampler"
    )


def are_finite(*tensors: Sequence[Tensor] | Tensor) -> Tensor:
    """bool [n] on the device: whether all values in entry i of each of `tensors`, which have n entries, are finite."""
    flags = [torch.stack([x.isfinite().all() for x in tensor]) for tensor in tensors]
    return torch.stack(flags).all(dim=0)
