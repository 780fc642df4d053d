"""Lays images out in a grid and writes it as a PNG."""

from pathlib import Path

from PIL import Image

from lmfusion.utils.files import replacing

MIN_CELL = 64
"""Pixels; smaller images are enlarged, each pixel to a square."""


def make_grid(images: list[Image.Image], num_columns: int, gap: int = 2) -> Image.Image:
    """One picture of equally large images, row by row, on white, `gap` pixels apart."""
    enlarge = max(1, -(-MIN_CELL // images[0].width))
    width, height = images[0].width * enlarge + gap, images[0].height * enlarge + gap
    num_rows = -(-len(images) // num_columns)
    grid = Image.new("RGB", (width * num_columns + gap, height * num_rows + gap), "white")
    for i, image in enumerate(images):
        cell = image.convert("RGB").resize((width - gap, height - gap), Image.Resampling.NEAREST)
        grid.paste(cell, (gap + width * (i % num_columns), gap + height * (i // num_columns)))
    return grid


def save_grid(grid: Image.Image, path: Path) -> None:
    """Write `grid` as a PNG, whole or not at all; the folder is created if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        grid.save(file, format="PNG")
