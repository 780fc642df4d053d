"""Grids of images: each at its place, enlarged without blur, on white."""

import numpy as np
from PIL import Image

from lmfusion.images.grid import MIN_CELL, make_grid, save_grid


def test_images_row_by_row_on_white(tmp_path):
    images = [Image.new("L", (32, 16), level) for level in (10, 20, 30)]
    grid = make_grid(images, num_columns=2, gap=3)
    scale = MIN_CELL // 32
    assert grid.size == (2 * (32 * scale + 3) + 3, 2 * (16 * scale + 3) + 3)
    pixels = np.asarray(grid)[..., 0]
    first, second, third = pixels[3, 3], pixels[3, 3 + 32 * scale + 3], pixels[3 + 16 * scale + 3, 3]
    assert (first, second, third) == (10, 20, 30)
    assert pixels[0].min() == 255 and pixels[-4, -4] == 255  # the border, and the cell without an image
    save_grid(grid, tmp_path / "new" / "grid.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "grid.png")), np.asarray(grid))


def test_large_images_keep_their_size():
    assert make_grid([Image.new("RGB", (100, 80))], num_columns=1).size == (104, 84)
