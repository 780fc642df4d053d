"""Random vision-language models of transformers' own classes, small enough for tests of the whole chain."""

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from lmfusion.model.modeling import LMFusion
from tests.lmfusion.conftest import build_tokenizer

SIDE, PATCH = 8, 4
"""Pixels of a tile and of a patch: a tile has 2 x 2 vision tokens."""
PINPOINTS = [[8, 16], [16, 8], [16, 16]]
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '[' + message['role'] + ']' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
"""As LLaVA-NeXT's for Llama 3: a message's images first, then its texts."""
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
IMAGE = {"hidden_size": 16, "patch_coder": {"kind": "linear"}}
CODEC = {"kind": "pixels", "channels": 1, "image_size": 4}


def save_vlm(folder, kind="llava_next", llm="llama", encoder="clip", template=TEMPLATE, **options):
    """A VLM with its processor in `folder`; answers with transformers' model and processor. options: of its config."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    tokenizer.chat_template = template
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    text = {"llama": LlamaConfig, "qwen2": Qwen2Config}[llm](vocab_size=len(tokenizer), **SIZES, **ids)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[encoder](
        **sizes, image_size=SIDE, patch_size=PATCH
    )
    strategy = "default" if encoder == "clip" else "full"
    shared = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "vision_feature_select_strategy": strategy,
        **options,
    }
    of_processor = {
        "patch_size": PATCH,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": int(encoder == "clip"),
        "chat_template": template,
    }
    pixels = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    torch.manual_seed(0)
    if kind == "llava_next":
        config = LlavaNextConfig(**shared, image_grid_pinpoints=PINPOINTS)
        model = LlavaNextForConditionalGeneration(config)
        image_processor = LlavaNextImageProcessorPil(**pixels, image_grid_pinpoints=PINPOINTS)
        processor = LlavaNextProcessor(image_processor, tokenizer, **of_processor)
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**shared))
        processor = LlavaProcessor(LlavaImageProcessorPil(**pixels), tokenizer, **of_processor)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval(), processor


def build(folder, dtype=torch.float32, **options):
    """A model whose every weight matters: weights that start at zero are random, too."""
    model = LMFusion.from_vlm(folder, image=IMAGE, codec=CODEC, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.image.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def picture(height, width, seed=0):
    """An image of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
