"""The decode and denoise steps as functions of tensors that never wait for the device: CUDA graphs can hold them."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lmfusion.generation.cache import KeyValueCache
from lmfusion.generation.decoding import SamplingParams, next_tokens
from lmfusion.generation.guidance import guide
from lmfusion.generation.samplers import advance
from lmfusion_kernels.layout.token_layout import TokenLayout

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion


class Branching(NamedTuple):
    """The image that each of B branches predicts for, and the branches of each of R images."""

    image: Tensor
    """int64 [B]"""
    branch: Tensor
    """int64 [R, 3], that of the whole prompt first; repeated if an image has fewer"""
    weights: Tensor
    """float32 [R, 3], 0 for repeated ones"""
    rescale: Tensor
    """float32 [R]"""


def decode_step(
    model: "LMFusion",
    cache: KeyValueCache,
    token_ids: Tensor,
    layout: TokenLayout,
    params: SamplingParams,
    is_greedy: bool,
) -> Tensor:
    """The tokens int64 [B] that follow `token_ids` int64 [B], each of which continues a cached document."""
    x_text = model.embed(token_ids)
    h_text, _ = model.run_layers(x_text, x_text.new_empty(0, model.config.image_hidden_size), layout, cache.layers)
    return next_tokens(model.text_logits(h_text), params, is_greedy)


def predict_step(
    model: "LMFusion",
    cache: KeyValueCache,
    x: Tensor,
    timesteps: Tensor,
    layout: TokenLayout,
    branching: Branching | None,
) -> Tensor:
    """The guided prediction for R noisy images x [R, C, h, w] at `timesteps` [R], each at the end of its documents.

    layout: of the images' tokens alone, one document per branch. branching: None if there is one document per image.
    """
    # Attention gives the tokens of other documents a weight of 0, but 0 times NaN is NaN. So the model gets zeros in
    # place of an image that is not finite, and the other images are unharmed. The image itself stays as it is: its
    # sampler continues from x, and the engine finds the NaN when the image is finished.
    is_finite = x.isfinite().flatten(1).all(dim=1)
    x = torch.where(is_finite[:, None, None, None], x, 0.0)
    x_image, skip = model.encode_images(x, timesteps)
    assert skip is not None
    if branching is not None:
        x_image = x_image.unflatten(0, (x.shape[0], -1)).index_select(0, branching.image).flatten(0, 1)
        skip = tuple(feature.index_select(0, branching.image) for feature in skip)
        timesteps = timesteps.index_select(0, branching.image)
    no_text = model.embed(torch.empty(0, dtype=torch.int64, device=x.device))
    _, h_image = model.run_layers(no_text, x_image, layout, cache.layers)
    predictions = model.decode_images(h_image, timesteps, skip).to(x.dtype)
    if branching is None:
        return predictions
    return guide(predictions, branching.branch, branching.weights, branching.rescale)


def denoise_step(
    model: "LMFusion",
    cache: KeyValueCache,
    x: Tensor,
    x0: Tensor,
    noise: Tensor,
    numbers: Tensor,
    layout: TokenLayout,
    branching: Branching | None,
    clip: float,
) -> tuple[Tensor, Tensor]:
    """(x, x0) of R images after one step of their samplers.

    x, x0 (the clean images predicted in the step before), noise: [R, C, h, w]. numbers: float32 [R, 7], the timestep of
    each image and its six coefficients (`samplers.StepTable`).
    """
    prediction = predict_step(model, cache, x, numbers[:, 0].to(torch.int64), layout, branching)
    return advance(x, prediction, x0, noise, numbers[:, 1:], clip)
