"""What can a trained model make? Images from text, captions from images, and text, over one key-value cache."""

from lmfusion.generation.captioning import caption_images
from lmfusion.generation.drawing import draw_images
from lmfusion.generation.text import generate_text

__all__ = ["caption_images", "draw_images", "generate_text"]
