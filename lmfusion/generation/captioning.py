"""What does an image show? It is read like a training image without noise, and the LLM goes on from there."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lmfusion.batch import SpecialTokens, caption_prompt, encode_caption
from lmfusion.generation.cache import check_context, generating
from lmfusion.generation.sampling import check_decoding, check_list, generators
from lmfusion.generation.text import continue_documents, require_tokenizer
from lmfusion.image.preprocessing import ImageSource, to_tensor

if TYPE_CHECKING:
    from lmfusion.modeling import LMFusion


def caption_images(
    model: "LMFusion",
    images: Sequence[ImageSource],
    *,
    prompt: str = "",
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
) -> list[str]:
    """A caption of each image, up to eos or `max_new_tokens`.

    images: files, Pillow images or arrays; cropped and resized to the codec's size. prompt: how every caption begins;
    it is not part of the answer. Images are read at timestep 0, without noise. Chance is keyed by (seed, index of the
    image).

    Raises ValueError for an empty list, a damaged, huge or unknown image, numbers out of range, or a document beyond
    the model's context; OSError for a file that cannot be opened.
    """
    check_list(images, "images", batch_size)
    check_decoding(max_new_tokens, temperature, top_p)
    tokenizer = require_tokenizer(model)
    codec, patch_coder = model.codec, model.image.patch_coder
    tokens = SpecialTokens.of(tokenizer, model.boi_token_id)
    prompt_ids = encode_caption(tokenizer, prompt) if prompt.strip() else []
    num_image_tokens = patch_coder.tokens_per_image(codec.latent_size, codec.latent_size)
    document = caption_prompt(prompt_ids, num_image_tokens, tokens)

    check_context(model, [document], max_new_tokens)
    answers: list[list[int]] = []
    with generating(model):
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            pixels = torch.stack([to_tensor(image, codec.config.image_size, codec.config.channels) for image in batch])
            latents = codec.encode(pixels.to(model.device))
            rows, _ = model.encode_images(latents, torch.zeros(len(batch), dtype=torch.int64, device=latents.device))
            answers += continue_documents(
                model,
                [document] * len(batch),
                rows,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                chance=generators(seed, range(start, start + len(batch))),
            )
    return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
