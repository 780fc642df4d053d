"""Guidance: the branches that an image's prediction is combined from, all computed in one forward.

A branch is a document that holds all of the prompt, a part of it, or nothing. With e for the network's prediction,
guidance by the text with scale s is (classifier-free guidance, LMFusion section 4.1)

    e(nothing) + s (e(all) - e(nothing))

and guidance by the images before it, too, with scale s_I, is (InstructPix2Pix, equation 3)

    e(nothing) + s_I (e(images) - e(nothing)) + s (e(all) - e(images))

Both are weighted sums of the branches' predictions; the weights add up to 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lmfusion.generation.options import GenerationOptions
from lmfusion.model.batch import Document, SpecialTokens

MAX_BRANCHES = 3


class ContextImage(NamedTuple):
    """A finished image in a document."""

    data: Tensor
    """Clean latents [C, h, w], or the vision encoder's embeddings [num_tokens, d_text]."""
    num_tokens: int
    is_vision: bool = False
    """Whether a vision encoder turned it into embeddings of the text tower."""

    def put(self, document: Document, tokens: SpecialTokens) -> Document:
        """`document` followed by the image, just as in a prompt."""
        if self.is_vision:
            return document.input_image(self.num_tokens)
        return document.marker(tokens.boi_token_id).image(self.num_tokens).marker(tokens.eoi_token_id)


class Branch(NamedTuple):
    """A branch other than that of the whole prompt: what comes before the image in it."""

    document: Document
    images: list[ContextImage]
    """The images in the document."""
    weight: float


class Guidance(NamedTuple):
    """The weight of the prediction from the whole prompt, and the other branches."""

    weight: float
    branches: list[Branch]


def guidance_of(
    options: GenerationOptions,
    images: Sequence[ContextImage],
    tokens: SpecialTokens,
    negative_ids: Sequence[int],
) -> Guidance:
    """The branches of an image that comes after `images`, the largest first. Those of weight 0 are left out."""
    scale, image_scale = options.guidance_scale, options.image_guidance_scale
    with_images = image_scale is not None and len(images) > 0
    weights = (scale, image_scale - scale, 1 - image_scale) if with_images else (scale, 0.0, 1 - scale)  # type: ignore[operator]
    branches = []
    for is_with_images, weight in zip((True, False), weights[1:], strict=True):
        if weight == 0:
            continue
        document = Document().text(tokens.bos)
        for image in images if is_with_images else ():
            document = image.put(document, tokens)
        document = document.text(negative_ids).marker(tokens.boi_token_id)
        branches.append(Branch(document, list(images) if is_with_images else [], weight))
    return Guidance(weights[0], branches)


def guide(predictions: Tensor, branch_index: Tensor, weights: Tensor, rescale: Tensor) -> Tensor:
    """Guided predictions [R, C, h, w] from those of all branches [B, C, h, w].

    branch_index: int64 [R, 3], the branches of each image, that of the whole prompt first. weights: [R, 3], 0 for
    branches that an image does not have. rescale: [R], how much of the standard deviation that guidance adds is taken
    back (Lin et al. 2023, equations 15 and 16).
    """
    parts = predictions[branch_index]  # [R, 3, C, h, w]
    guided = (parts * weights[:, :, None, None, None]).sum(dim=1)
    spread = guided.flatten(1).std(dim=1, correction=0).clamp(min=torch.finfo(guided.dtype).tiny)
    factor = rescale * (parts[:, 0].flatten(1).std(dim=1, correction=0) / spread) + (1 - rescale)
    return guided * factor[:, None, None, None]
