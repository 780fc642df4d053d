"""Models without files, and batches for them, on which FLOPs and memory are counted."""

import torch
from transformers import LlamaConfig

from lmfusion.model.batch import SpecialTokens, caption_first_document, image_first_document, pack
from lmfusion.model.configuration import ImageTowerConfig, LMFusionConfig
from lmfusion.model.modeling import LMFusion

TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
SMOLLM2_LAYERS = {
    "vocab_size": 4000,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
"""Two layers of SmolLM2-135M, with a smaller vocabulary."""
LINEAR = {"kind": "linear", "patch_size": 2}
UNET = {"kind": "unet", "patch_size": 2, "channels": [16, 24], "num_blocks": 2}


def make_model(frozen_text=True, recompute="none", llm=TINY, dtype=torch.float32, image_size=16, **image):
    """A model in training with random weights: frozen ones in `dtype`, trained ones in float32."""
    torch.manual_seed(0)
    image = ImageTowerConfig(**{"patch_coder": LINEAR, **image})
    codec = {"kind": "pixels", "channels": 1, "image_size": image_size}
    model = LMFusion(LMFusionConfig(LlamaConfig(**llm), image, codec)).train()
    model.freeze_text(frozen_text)
    if frozen_text:
        model.text.to(dtype)
    model.compute_dtype, model.recompute = dtype, recompute
    return model


def make_batch(model, num_pairs=2, caption_tokens=10):
    """`num_pairs` documents of each kind: caption first, image first, without a caption."""
    tokens = SpecialTokens(model.boi_token_id, model.eoi_token_id, bos_token_id=1, eos_token_id=2)
    caption, num_image = list(range(5, 5 + caption_tokens)), model.tokens_per_image
    documents = [
        caption_first_document(caption, num_image, tokens),
        image_first_document(caption, num_image, tokens),
        caption_first_document([], num_image, tokens),
    ] * num_pairs
    size = model.codec.latent_size
    latents = torch.randn(len(documents), model.codec.latent_channels, size, size)
    timesteps = torch.randint(0, 1000, (len(documents),))
    return pack(documents, latents, torch.randn_like(latents), timesteps, frozen_text=model.frozen_text)
