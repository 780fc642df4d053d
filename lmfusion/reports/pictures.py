"""One picture of many: images in a grid with captions below and frames that show which are right."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lmfusion.utils.files import atomic_write

RIGHT, WRONG = (30, 150, 60), (210, 40, 40)
"""Colours of frames, RGB."""
_GAP, _LINE = 6, 14
"""Pixels between images, and of a line of text."""

AnyFont = ImageFont.FreeTypeFont | ImageFont.ImageFont


def captioned_grid(
    cells: Sequence[tuple[Sequence[Image.Image], str, bool]], num_columns: int, *, image_side: int = 96
) -> Image.Image:
    """Images with their captions. The frame of the last image in a cell shows whether it is right.

    cells: images side by side, their caption, and whether the last one is right. image_side: in pixels.
    """
    width = max(len(images) for images, _, _ in cells) * (image_side + _GAP) + _GAP
    height = image_side + 3 * _LINE + 2 * _GAP
    grid = Image.new("RGB", (num_columns * width, -(-len(cells) // num_columns) * height), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(11)
    for number, (images, caption, is_right) in enumerate(cells):
        x, y = number % num_columns * width + _GAP, number // num_columns * height + _GAP
        for i, image in enumerate(images):
            left = x + i * (image_side + _GAP)
            grid.paste(image.convert("RGB").resize((image_side, image_side), Image.Resampling.NEAREST), (left, y))
            colour = "lightgray" if i < len(images) - 1 else RIGHT if is_right else WRONG
            draw.rectangle((left - 2, y - 2, left + image_side + 1, y + image_side + 1), outline=colour, width=2)
        for i, line in enumerate(_wrap(caption, font, width - 2 * _GAP)):
            draw.text((x, y + image_side + 2 + i * _LINE), line, fill="black", font=font)
    return grid


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all. Makes the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        picture.save(file, format="PNG")


def _wrap(text: str, font: AnyFont, width: int) -> list[str]:
    """The lines of a text that is at most `width` pixels wide; longer words are not broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
