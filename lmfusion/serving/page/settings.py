"""Which settings does the page offer, and what do they ask of an answer?"""

import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lmfusion.generation.options import SAMPLERS, GenerationOptions, Limits
from lmfusion.generation.prompt import context_limit

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

NUM_STEPS = 20
"""Enough for DPM-Solver++, which the page begins with."""
MAX_STEPS, MAX_IMAGES = 200, 8
"""Where the sliders end; limits may be lower."""
LEAST_SIZE_TO_CHANGE = 64
"""Pixels a side. A model of smaller pictures has learned that size alone, and the page does not offer others."""

WAYS = {
    "conversation": "the conversation",
    "message": "this message alone",
    "plain": "plain text, without chat template",
}
"""What the prompt of an answer is."""


def build_settings(model: "LMFusion", limits: Limits, way: str = "conversation") -> dict[str, Any]:
    """Lay out the controls where the caller is in a `gr.Blocks`; answer with them by the names of `read_options`.

    way: which of WAYS is chosen at first, where the model has a chat template.
    """
    import gradio as gr

    most_tokens = min(limits.max_new_tokens, context_limit(model) or limits.max_new_tokens)
    most_images, most_steps = min(MAX_IMAGES, limits.max_images), min(MAX_STEPS, limits.max_num_steps)
    found: dict[str, Any] = {}
    with gr.Row(equal_height=True):
        found["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120, elem_id="seed")
        found["is_random"] = gr.Checkbox(True, label="Random", min_width=100, elem_id="random-seed")
    with gr.Accordion("Pictures", open=True):
        with gr.Row():
            found["max_images"] = gr.Number(
                min(1, most_images),
                label="At most",
                precision=0,
                minimum=0,
                maximum=most_images,
                min_width=90,
                elem_id="max-images",
            )
            found["min_images"] = gr.Number(
                0, label="At least", precision=0, minimum=0, maximum=most_images, min_width=90, elem_id="min-images"
            )
        found["draw_first"] = gr.Checkbox(False, label="Begin with a picture", elem_id="draw-first")
        found["num_steps"] = gr.Slider(
            1, most_steps, min(NUM_STEPS, most_steps), step=1, label="Steps", elem_id="num-steps"
        )
        found["sampler"] = gr.Dropdown(list(SAMPLERS), value="dpm-solver", label="Sampler", elem_id="sampler")
        found["guidance_scale"] = gr.Slider(
            0, 15, 2.0, step=0.05, label="Guidance", info="1: none; more: closer to the prompt", elem_id="guidance"
        )
        found["negative_prompt"] = gr.Textbox(label="Keep away from", max_lines=3, elem_id="negative-prompt")
        if sizes := _sizes(model, limits):
            found["image_size"] = gr.Dropdown(
                sizes, value=model.codec.config.image_size, label="Pixels a side", elem_id="image-size"
            )
        found["preview_every"] = gr.Slider(
            0, 50, 1, step=1, label="Steps between previews", info="0: no previews", elem_id="preview-every"
        )
    with gr.Accordion("Text", open=True):
        found["max_new_tokens"] = gr.Slider(
            1, most_tokens, min(256, most_tokens // 2), step=1, label="Tokens at most", elem_id="max-tokens"
        )
        found["temperature"] = gr.Slider(
            0, 2, 0.0, step=0.05, label="Temperature", info="0: the likeliest word each time", elem_id="temperature"
        )
        found["top_p"] = gr.Slider(0.05, 1, 1.0, step=0.05, label="Top-p", elem_id="top-p")
        found["reads"] = gr.Radio(
            [(label, way) for way, label in WAYS.items()],
            value=way if has_chat_template(model) else "plain",
            label="The model reads",
            interactive=has_chat_template(model),
            elem_id="reads",
        )
    return found


def read_options(values: Mapping[str, Any]) -> tuple[GenerationOptions, str]:
    """What an answer is asked for, and which of WAYS its prompt is read in. A random seed is chosen here.

    Raises ValueError for values that do not go together or are out of range.
    """
    values = dict(values)
    way = values.pop("reads")
    if values.pop("is_random"):
        values["seed"] = secrets.randbelow(2**31)
    for name, label in {"seed": "Seed", "max_images": "At most", "min_images": "At least"}.items():
        if values[name] is None:
            raise ValueError(f"{label} is empty; write a whole number")
    values["negative_prompt"] = values["negative_prompt"] or None
    return GenerationOptions(**values), way


def has_chat_template(model: "LMFusion") -> bool:
    """Whether the model's tokenizer knows how a conversation is written."""
    return bool(getattr(model.tokenizer, "chat_template", None))


def _sizes(model: "LMFusion", limits: Limits) -> list[int]:
    """Half to twice the size that the model was trained with, where codec and patches can make them."""
    trained = model.codec.config.image_size
    if trained < LEAST_SIZE_TO_CHANGE:
        return []
    unit = model.codec.downscale * model.config.image.patch_coder.patch_size
    sizes = {round(trained * quarters / 4 / unit) * unit for quarters in range(2, 9)}
    return sorted(size for size in sizes | {trained} if unit <= size <= limits.max_image_size)
