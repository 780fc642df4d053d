"""The page's settings: its controls, and how their values become generation options."""

import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lmfusion.generation.options import SAMPLERS, GenerationOptions, Limits
from lmfusion.generation.prompt import context_limit

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

NUM_STEPS = 20
"""Enough for DPM-Solver++, the sampler selected at first."""
MAX_STEPS, MAX_IMAGES = 200, 8
"""Ends of the sliders. The engine's limits may be lower."""
MIN_RESIZABLE = 64
"""Pixels. A model with a smaller image size has learned only that size, so the page offers no others."""

PROMPT_MODES = {
    "conversation": "the whole conversation",
    "last_message": "the last message only",
    "raw_text": "the last message as raw text, without chat template",
}
"""What the prompt of an answer contains, with the labels on the page."""


def build_settings(model: "LMFusion", limits: Limits, prompt_mode: str = "conversation") -> dict[str, Any]:
    """Create the controls in the current `gr.Blocks`. Returns them by the names that `read_options` expects.

    prompt_mode: which of PROMPT_MODES is selected at first, if the model has a chat template.
    """
    import gradio as gr

    max_tokens = min(limits.max_new_tokens, context_limit(model) or limits.max_new_tokens)
    max_images, max_steps = min(MAX_IMAGES, limits.max_images), min(MAX_STEPS, limits.max_num_steps)
    controls: dict[str, Any] = {}
    with gr.Row(equal_height=True):
        controls["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120, elem_id="seed")
        controls["is_random"] = gr.Checkbox(True, label="Random", min_width=100, elem_id="random-seed")
    with gr.Accordion("Images", open=True):
        with gr.Row():
            controls["max_images"] = gr.Number(
                min(1, max_images),
                label="Max images",
                precision=0,
                minimum=0,
                maximum=max_images,
                min_width=90,
                elem_id="max-images",
            )
            controls["min_images"] = gr.Number(
                0, label="Min images", precision=0, minimum=0, maximum=max_images, min_width=90, elem_id="min-images"
            )
        controls["draw_first"] = gr.Checkbox(False, label="Start with an image", elem_id="draw-first")
        controls["num_steps"] = gr.Slider(
            1, max_steps, min(NUM_STEPS, max_steps), step=1, label="Steps", elem_id="num-steps"
        )
        controls["sampler"] = gr.Dropdown(list(SAMPLERS), value="dpm-solver", label="Sampler", elem_id="sampler")
        controls["guidance_scale"] = gr.Slider(
            0,
            15,
            2.0,
            step=0.05,
            label="Guidance scale",
            info="1: none; higher: closer to the prompt",
            elem_id="guidance",
        )
        controls["negative_prompt"] = gr.Textbox(label="Negative prompt", max_lines=3, elem_id="negative-prompt")
        if sizes := _sizes(model, limits):
            controls["image_size"] = gr.Dropdown(
                sizes, value=model.codec.config.image_size, label="Image size", elem_id="image-size"
            )
        controls["preview_every"] = gr.Slider(
            0, 50, 1, step=1, label="Preview every", info="in steps; 0: no previews", elem_id="preview-every"
        )
    with gr.Accordion("Text", open=True):
        controls["max_new_tokens"] = gr.Slider(
            1, max_tokens, min(256, max_tokens // 2), step=1, label="Max tokens", elem_id="max-tokens"
        )
        controls["temperature"] = gr.Slider(
            0, 2, 0.0, step=0.05, label="Temperature", info="0: always the most likely token", elem_id="temperature"
        )
        controls["top_p"] = gr.Slider(0.05, 1, 1.0, step=0.05, label="Top p", elem_id="top-p")
        controls["prompt_mode"] = gr.Radio(
            [(label, mode) for mode, label in PROMPT_MODES.items()],
            value=prompt_mode if has_chat_template(model) else "raw_text",
            label="Prompt",
            interactive=has_chat_template(model),
            elem_id="prompt-mode",
        )
    return controls


def read_options(values: Mapping[str, Any]) -> tuple[GenerationOptions, str]:
    """The generation options and the prompt mode in the values of the controls. Chooses the seed if it is random.

    Raises:
        ValueError: for values that contradict each other or are out of range.
    """
    values = dict(values)
    prompt_mode = values.pop("prompt_mode")
    if values.pop("is_random"):
        values["seed"] = secrets.randbelow(2**31)
    for name, label in {"seed": "Seed", "max_images": "Max images", "min_images": "Min images"}.items():
        if values[name] is None:
            raise ValueError(f"{label} must be a whole number; it is empty")
    values["negative_prompt"] = values["negative_prompt"] or None
    return GenerationOptions(**values), prompt_mode


def has_chat_template(model: "LMFusion") -> bool:
    """Whether the model's tokenizer has a chat template."""
    return bool(getattr(model.tokenizer, "chat_template", None))


def _sizes(model: "LMFusion", limits: Limits) -> list[int]:
    """Half to twice the size that the model was trained with, in steps that the codec and the patches allow."""
    trained = model.codec.config.image_size
    if trained < MIN_RESIZABLE:
        return []
    unit = model.codec.downscale * model.config.image.patch_coder.patch_size
    sizes = {round(trained * quarters / 4 / unit) * unit for quarters in range(2, 9)}
    return sorted(size for size in sizes | {trained} if unit <= size <= limits.max_image_size)
