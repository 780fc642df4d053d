"""The losses of a batch: what `LMFusion.forward` returns, and the loss of beginning an image."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from lmfusion.model.batch import Batch

MAX_LOGITS = 2**24
"""Logits without a gradient that are held at a time: 64 MiB in float32."""


@dataclass
class LMFusionOutput(ModelOutput):
    """What `LMFusion.forward` returns: the logits for `input_ids`, everything else for a batch."""

    loss: Tensor | None = None
    """lm_loss_sum / num_labels + boi_loss_sum / num_boi_targets
    + loss_weight * diffusion_loss_sum / num_target_images"""
    lm_loss_sum: Tensor | None = None
    """Cross-entropy summed over the labels, in nats"""
    num_labels: int | None = None
    boi_loss_sum: Tensor | None = None
    """With a frozen text tower: cross-entropy of "an image begins here" at the tokens before each document's first
    image, as in `boi_loss_sum`, summed over them, in nats"""
    num_boi_targets: int | None = None
    diffusion_loss_sum: Tensor | None = None
    """Mean squared error of each target image, summed over them"""
    num_target_images: int | None = None
    logits: Tensor | None = None
    """[B, T, V]"""


def total_loss(
    batch: Batch, lm_loss_sum: Tensor, boi_loss_sum: Tensor, diffusion_loss_sum: Tensor, diffusion_weight: float
) -> LMFusionOutput:
    """The output of a batch: each sum over its count, added up."""
    loss = lm_loss_sum / max(1, batch.num_labels) + boi_loss_sum / max(1, batch.num_boi_targets)
    loss = loss + diffusion_weight * diffusion_loss_sum / max(1, batch.num_target_images)
    return LMFusionOutput(
        loss=loss,
        lm_loss_sum=lm_loss_sum,
        num_labels=batch.num_labels,
        boi_loss_sum=boi_loss_sum,
        num_boi_targets=batch.num_boi_targets,
        diffusion_loss_sum=diffusion_loss_sum,
        num_target_images=batch.num_target_images,
    )


def boi_loss_sum(h: Tensor, head: Tensor, marker_head: Tensor, is_boi: Tensor) -> Tensor:
    """Cross-entropy of "BOI" against "any token of the LLM's vocabulary", summed over constant tokens.

    h: [n, d_text], hidden states without a gradient. head: [V, d_text]. marker_head: [2, d_text], for BOI and EOI.
    is_boi: bool [n], whether an image begins after the token.

    The gradient of `marker_head` is that of a cross-entropy over all V + 2 logits. How well the LLM predicts its text,
    which nothing can change, is left out of the sum.
    """
    wide = torch.promote_types(h.dtype, torch.float32)
    with torch.no_grad():  # in chunks: all logits of a large vocabulary would not fit into memory
        chunks = h.split(max(1, MAX_LOGITS // head.shape[0]))
        head = head.to(h.dtype)
        vocabulary = torch.cat([F.linear(chunk, head).to(wide).logsumexp(dim=-1) for chunk in chunks])
    markers = F.linear(h, marker_head.to(h.dtype)).to(wide)
    total = torch.logaddexp(vocabulary, markers.logsumexp(dim=-1))
    return (total - torch.where(is_boi, markers[:, 0], vocabulary)).sum()
