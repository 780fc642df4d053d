"""Tiny models that generate text and images, for the tests of generation."""

import torch

from lmfusion.generation import GenerationOptions, encode_prompt
from lmfusion.model.batch import SpecialTokens
from lmfusion.model.modeling import LMFusion
from tests.lmfusion.generation import reference

UNET = {"kind": "unet", "channels": (8, 16), "num_blocks": 1}


def build(folder, dtype=torch.float64, **patch_coder):
    """A model whose every weight matters: weights that training starts at zero are random, too."""
    model = LMFusion.from_llm(
        folder,
        image={"hidden_size": 16, "patch_coder": {"kind": "linear", **patch_coder}},
        codec={"kind": "pixels", "channels": 1, "image_size": 8},
        diffusion={"prediction_type": "v_prediction"},
        dtype=dtype,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.image.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tokens_of(model):
    return SpecialTokens.of(model.tokenizer, model.boi_token_id)


@torch.no_grad()
def teach_boi(model, prompt, num_tokens):
    """Make the model begin an image by itself after `num_tokens` tokens of its greedy answer to `prompt`.

    BOI's row of the head becomes the output of the text tower there, just long enough to win.
    """
    read = encode_prompt(model, prompt)
    options = GenerationOptions(max_new_tokens=num_tokens + 4)
    model.image.marker_head[0] = 0
    ids = reference.answer(model, read, options)[0]
    context = reference.Context()
    for part in read.document(model.tokens_per_image, tokens_of(model)), *ids[:num_tokens]:
        if isinstance(part, int):
            context = context.text([part])
        else:
            latents = [model.codec.encode(image[None])[0] for image in read.images]
            context = reference.Context(part, tuple(latents))
    h = reference.read(model, context)[0]
    best = model.text_logits(h)[:, : model.boi_token_id].max(dim=1).values
    direction = h[-1] / h[-1].norm()
    model.image.marker_head[0] = (best[-1] * 1.05 / h[-1].norm()) * direction
