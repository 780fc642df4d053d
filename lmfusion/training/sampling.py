"""How does it look so far? A picture of images drawn from a few prompts."""

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from lmfusion.training.config import SampleConfig
from lmfusion.utils.files import replacing

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

MIN_CELL = 64
"""Pixels; smaller images are enlarged, each pixel to a square."""


def draw_grid(model: "LMFusion", config: SampleConfig) -> Image.Image:
    """A picture with a row for each of the configured prompts, of images from the seeds 0 and up."""
    prompts = [prompt for prompt in config.prompts for _ in range(config.num_images)]
    images = model.draw(
        prompts,
        guidance_scale=config.guidance_scale,
        num_steps=config.num_steps,
        sampler=config.sampler,
        seed=0,
    )
    return make_grid(images, num_columns=config.num_images)


def save_grid(grid: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        grid.save(file, format="PNG")


def make_grid(images: list[Image.Image], num_columns: int, gap: int = 2) -> Image.Image:
    """One picture of equally large images, row by row, on white."""
    enlarge = max(1, -(-MIN_CELL // images[0].width))
    width, height = images[0].width * enlarge + gap, images[0].height * enlarge + gap
    num_rows = -(-len(images) // num_columns)
    grid = Image.new("RGB", (width * num_columns + gap, height * num_rows + gap), "white")
    for i, image in enumerate(images):
        cell = image.convert("RGB").resize((width - gap, height - gap), Image.Resampling.NEAREST)
        grid.paste(cell, (gap + width * (i % num_columns), gap + height * (i // num_columns)))
    return grid
