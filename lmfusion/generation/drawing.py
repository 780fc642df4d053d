"""How does a prompt become an image? The prompt is read once; then every denoising step runs the image rows alone."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from lmfusion.batch import Document, SpecialTokens, draw_prompt, encode_caption
from lmfusion.generation.cache import KeyValueCache, check_context, generating
from lmfusion.generation.sampling import check_list, generators
from lmfusion.generation.text import require_tokenizer
from lmfusion.image.preprocessing import to_pil

if TYPE_CHECKING:
    from lmfusion.modeling import LMFusion


def draw_images(
    model: "LMFusion",
    prompts: Sequence[str],
    *,
    guidance_scale: float = 1.55,
    num_steps: int = 50,
    sampler: str = "ddpm",
    seed: int = 0,
    negative_prompt: str | None = None,
    batch_size: int = 8,
    image_size: int | None = None,
) -> list[Image.Image]:
    """One image for each prompt.

    guidance_scale: how far to go from the unconditional prediction to the prompt's and beyond it; 1 is the prompt's
    alone, and then no unconditional branch is run. negative_prompt: takes the place of the unconditional prompt,
    which has no caption. sampler: "ddpm", "ddim" or "dpm-solver". image_size: pixels a side, default the codec's.

    Noise is keyed by (seed, index of the prompt), so batch_size does not change an image.

    Raises ValueError for an empty list or prompt, numbers out of range, an unknown sampler, a size that codec or
    patch coder cannot make, or a prompt beyond the model's context.
    """
    check_list(prompts, "prompts", batch_size)
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ValueError(f"guidance_scale is {guidance_scale}; it must be a finite number, 0 or more (1: no guidance)")
    tokenizer = require_tokenizer(model)
    tokens = SpecialTokens.of(tokenizer, model.boi_token_id)
    documents = [draw_prompt(encode_caption(tokenizer, prompt), tokens) for prompt in prompts]
    negative_ids = encode_caption(tokenizer, negative_prompt) if negative_prompt else []
    unconditional = draw_prompt(negative_ids, tokens)
    latent_shape = _latent_shape(model, image_size)
    check_context(model, [*documents, unconditional], model.image.patch_coder.tokens_per_image(*latent_shape[1:]))
    model.diffusion.sampler(sampler, num_steps, model.codec.latent_range)  # complain before anything is computed

    images: list[Image.Image] = []
    with generating(model):
        for start in range(0, len(documents), batch_size):
            batch = documents[start : start + batch_size]
            chance = generators(seed, range(start, start + len(batch)))
            guided = guidance_scale != 1
            denoiser = Denoiser(model, batch + [unconditional] * len(batch) if guided else batch, latent_shape)
            latents = torch.stack([torch.randn(latent_shape, generator=generator) for generator in chance]).to(
                model.device
            )
            run = model.diffusion.sampler(sampler, num_steps, model.codec.latent_range)
            for timestep in run.timesteps:
                prediction = denoiser.predict(latents, timestep)
                if guided:
                    conditional, base = prediction.chunk(2)
                    prediction = base + guidance_scale * (conditional - base)
                latents = run.step(prediction, timestep, latents, chance)
            images += to_pil(model.codec.decode(latents))
    return images


class Denoiser:
    """The network's predictions for one image at the end of each document, all documents in one forward.

    The documents are read once, here. `predict` runs image rows only, against the cached keys and values; it writes the
    image's own behind them, in the place of the step before. To be made and used in `generating(model)`.
    """

    def __init__(self, model: "LMFusion", documents: Sequence[Document], latent_shape: tuple[int, int, int]) -> None:
        num_image_tokens = model.image.patch_coder.tokens_per_image(*latent_shape[1:])
        longest = max(document.num_tokens for document in documents)
        self._model = model
        self._num_documents = len(documents)
        self._cache = KeyValueCache(model, len(documents), longest + num_image_tokens)
        self._cache.read(model, documents)
        self._layout = self._cache.layout([[("image", num_image_tokens)]] * len(documents))
        self._no_text = model.embed(torch.empty(0, dtype=torch.int64, device=model.device))

    def predict(self, latents: Tensor, timestep: int) -> Tensor:
        """Raw predictions [num_documents, C, h, w] for noisy `latents` [B, C, h, w] at `timestep`.

        With fewer latents than documents they repeat, coded once: documents b, b + B, ... share latent b.
        """
        num_repeats = self._num_documents // latents.shape[0]
        timesteps = torch.full((latents.shape[0],), timestep, device=latents.device)
        rows, skip = self._model.encode_images(latents, timesteps)
        assert skip is not None
        if num_repeats > 1:
            rows, timesteps = rows.repeat(num_repeats, 1), timesteps.repeat(num_repeats)
            skip = tuple(feature.repeat(num_repeats, 1, 1, 1) for feature in skip)
        _, h_image = self._model.run_layers(
            self._no_text, rows.to(self._no_text.dtype), self._layout, self._cache.layers
        )
        return self._model.decode_images(h_image, timesteps, skip).to(latents.dtype)


def _latent_shape(model: "LMFusion", image_size: int | None) -> tuple[int, int, int]:
    codec = model.codec
    image_size = codec.config.image_size if image_size is None else image_size
    if image_size < 1 or image_size % codec.downscale:
        raise ValueError(f"image_size is {image_size}; the codec makes positive multiples of {codec.downscale} pixels")
    size = image_size // codec.downscale
    return codec.latent_channels, size, size
