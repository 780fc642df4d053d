"""What is an image's prediction guided by? Branches that know less than the prompt, all computed in one forward.

Guided by text, with scale s (classifier-free guidance, LMFusion section 4.1), e being the network's prediction:

    e(nothing) + s (e(all) - e(nothing))

and by the images that come before it, too, with scale s_I (InstructPix2Pix, equation 3):

    e(nothing) + s_I (e(images) - e(nothing)) + s (e(all) - e(images))

Both are sums of the branches' predictions with weights that add up to 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lmfusion.generation.options import GenerationOptions
from lmfusion.model.batch import Document, SpecialTokens

MAX_BRANCHES = 3


class ContextImage(NamedTuple):
    """An image that stands in a document already."""

    data: Tensor
    """Clean latents [C, h, w]; of one that is seen its rows [num_rows, d_text]."""
    num_rows: int
    is_seen: bool = False
    """Whether a vision encoder made rows of the text tower of it."""

    def put(self, document: Document, tokens: SpecialTokens) -> Document:
        """`document` followed by the image, as prompts hold it."""
        if self.is_seen:
            return document.input_image(self.num_rows)
        return document.marker(tokens.boi_token_id).image(self.num_rows).marker(tokens.eoi_token_id)


class Branch(NamedTuple):
    """What a branch other than the whole prompt's reads before the image."""

    document: Document
    images: list[ContextImage]
    """Those in the document."""
    weight: float


class Guidance(NamedTuple):
    """The weight of the prediction that knows everything, and the other branches."""

    weight: float
    branches: list[Branch]


def guidance_of(
    options: GenerationOptions,
    images: Sequence[ContextImage],
    tokens: SpecialTokens,
    negative_ids: Sequence[int],
) -> Guidance:
    """The branches of an image that comes after `images`. Branches without weight are left out."""
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

    branch_index: int64 [R, 3], the branches of each image, that of the whole prompt first. weights: [R, 3], 0 where
    there are fewer. rescale: [R], how much of the standard deviation that guidance adds is taken back (Lin et al. 2023,
    equations 15 and 16).
    """
    parts = predictions[branch_index]  # [R, 3, C, h, w]
    guided = (parts * weights[:, :, None, None, None]).sum(dim=1)
    spread = guided.flatten(1).std(dim=1, correction=0).clamp(min=torch.finfo(guided.dtype).tiny)
    factor = rescale * (parts[:, 0].flatten(1).std(dim=1, correction=0) / spread) + (1 - rescale)
    return guided * factor[:, None, None, None]
