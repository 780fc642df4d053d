"""The specification of an answer: no cache, no batch, no joint branches. Every step computes the whole document."""

from dataclasses import dataclass, field, replace

import torch

import lmfusion_kernels as lk
from lmfusion.generation.decoding import random_generator
from lmfusion.generation.prompt import end_token_ids
from lmfusion.generation.samplers import step_table
from lmfusion.model.batch import Document, SpecialTokens, encode_caption, number_vision_tokens
from lmfusion.model.vision import VisionInput


@dataclass
class Context:
    """The document so far, with the clean latents of its images."""

    document: Document = field(default_factory=Document)
    latents: tuple = ()
    seen: tuple = ()
    """Embeddings of images that a vision encoder made."""

    def text(self, ids):
        return replace(self, document=self.document.text(ids))

    def marker(self, token_id):
        return replace(self, document=self.document.marker(token_id))

    def image(self, latents, num_rows):
        return replace(self, document=self.document.image(num_rows), latents=(*self.latents, latents))

    def see(self, rows):
        return replace(self, document=self.document.input_image(len(rows)), seen=(*self.seen, rows))


@torch.no_grad()
def read(model, context, timesteps=None):
    """(h_text, predictions of the last image) of the whole document in one forward."""
    layout = lk.TokenLayout.from_spans([context.document.spans])
    ids = torch.from_numpy(number_vision_tokens([context.document]))
    x_text = model.embed(ids, torch.cat(context.seen) if context.seen else None)
    rows, coded = [], None
    for i, latents in enumerate(context.latents):
        is_last = timesteps is not None and i == len(context.latents) - 1
        t = torch.tensor([timesteps if is_last else 0])
        coded = (t, model.encode_images(latents[None], t))
        rows.append(coded[1][0])
    x_image = torch.cat(rows) if rows else x_text.new_empty(0, model.config.image_hidden_size)
    h_text, h_image = model.run_layers(x_text, x_image, layout)
    if timesteps is None:
        return h_text, None
    t, (last_rows, skip) = coded
    return h_text, model.decode_images(h_image[-len(last_rows) :], t, skip)[0].to(context.latents[-1].dtype)


def draw(model, context, options, number, index, negative_ids, tokens, latent_shape):
    """Clean latents of the next image of `context`, which ends with BOI; guidance in one forward per branch."""
    rows = model.image.patch_coder.tokens_per_image(*latent_shape[1:])
    bare = Context().text(tokens.bos)
    nothing = bare.text(negative_ids).marker(tokens.boi_token_id)
    images = bare
    for seen_rows in context.seen:
        images = images.see(seen_rows)
    for latents in context.latents:
        num_rows = model.image.patch_coder.tokens_per_image(*latents.shape[1:])
        images = images.marker(tokens.boi_token_id).image(latents, num_rows).marker(tokens.eoi_token_id)
    images = images.text(negative_ids).marker(tokens.boi_token_id)
    table = step_table(model.diffusion, options.sampler, options.num_steps, model.codec.latent_range)
    generator = random_generator(options.seed, index, 1 + number)
    x, x0 = torch.randn(latent_shape, generator=generator), torch.zeros(latent_shape)

    def predict(context, timestep):
        return read(model, context.image(x, rows), timestep)[1]

    for timestep, (c0, c1, c2, c3, c4, c5) in zip(table.timesteps, table.coefficients.tolist(), strict=True):
        prediction = full = predict(context, timestep)
        low, high = options.guidance_interval
        if low <= timestep / 1000 <= high:
            base = predict(nothing, timestep)
            if options.image_guidance_scale is not None and (context.latents or context.seen):
                middle = predict(images, timestep)
                prediction = base + options.image_guidance_scale * (middle - base)
                prediction = prediction + options.guidance_scale * (full - middle)
            else:
                prediction = base + options.guidance_scale * (full - base)
            factor = options.guidance_rescale * full.std(correction=0) / prediction.std(correction=0)
            prediction = prediction * (factor + 1 - options.guidance_rescale)
        x0_now = (c0 * x + c1 * prediction).clamp(-table.clip, table.clip)
        noise = torch.randn(latent_shape, generator=generator) if c5 else torch.zeros(latent_shape)
        x, x0 = c2 * x + c3 * x0_now + c4 * x0 + c5 * noise, x0_now
    return x


def answer(model, prompt, options, index=0):
    """Greedy answer: ids and latents in order, as [ids, latents, ids, ...]."""
    tokens = SpecialTokens.of(model.tokenizer, model.boi_token_id)
    negative_ids = encode_caption(model.tokenizer, options.negative_prompt) if options.negative_prompt else []
    codec = model.codec
    size = (options.image_size or codec.config.image_size) // codec.downscale
    latent_shape = (codec.latent_channels, size, size)
    rows = model.image.patch_coder.tokens_per_image(size, size)
    context = Context()
    for part in prompt.parts:
        if isinstance(part, VisionInput):
            [seen_rows] = model.vision.encode([part])
            context = context.see(seen_rows)
        elif isinstance(part, torch.Tensor):
            latents = codec.encode(part[None])[0]
            context = context.marker(tokens.boi_token_id).image(latents, model.tokens_per_image)
            context = context.marker(tokens.eoi_token_id)
        else:
            context = context.text(part)
    parts, ids, num_new, num_images = [], [], 0, 0
    wants_image = options.draw_first or not options.max_new_tokens
    while True:
        if not wants_image:
            logits = model.text_logits(read(model, context)[0][-1:])[0]
            can_start_image = num_images < options.max_images
            token_id = int(logits[: model.boi_token_id + can_start_image].argmax())
            if token_id in end_token_ids(model):
                if num_images >= options.min_images:
                    return [*parts, ids]
                wants_image = True
            elif token_id == model.boi_token_id:
                wants_image = True
            else:
                ids.append(token_id)
                num_new += 1
                context = context.text([token_id])
                wants_image = num_new >= options.max_new_tokens and num_images < options.min_images
        if wants_image:
            context = context.marker(tokens.boi_token_id)
            latents = draw(model, context, options, num_images, index, negative_ids, tokens, latent_shape)
            context = context.image(latents, rows).marker(tokens.eoi_token_id)
            parts, ids, num_images = [*parts, ids, latents], [], num_images + 1
            wants_image = num_new >= options.max_new_tokens and num_images < options.min_images
        if num_new >= options.max_new_tokens and num_images >= options.min_images:
            return [*parts, ids]
