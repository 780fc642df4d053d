"""How does it look so far? A picture of images drawn from a few prompts."""

from typing import TYPE_CHECKING

from PIL import Image

from lmfusion.images.grid import make_grid
from lmfusion.training.config import SampleConfig

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion


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
