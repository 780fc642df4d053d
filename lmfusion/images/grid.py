"""Grids of images: several pictures of one size in rows, as one picture."""

from pathlib import Path

from PIL import Image

from lmfusion.utils.files import atomic_write

MIN_CELL = 64
"""Pixels; smaller images are enlarged, each pixel to a square."""


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


def save_grid(grid: Image.Image, path: Path) -> None:
    """Write a PNG file whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        grid.save(file, format="PNG")
