"""Grids of captioned images, and how they are saved."""

import pytest
from PIL import Image

from lmfusion.reports.pictures import RIGHT, WRONG, captioned_grid, save_picture


def test_frames_show_what_is_right():
    image = Image.new("RGB", (8, 8), "white")
    cells = [((image,), "a very " * 9, True), ((image, image), "b", False)]
    grid = captioned_grid(cells, 2, image_side=40)
    colours = {colour for _, colour in grid.getcolors(10**6)}
    assert {RIGHT, WRONG} <= colours
    only_right = captioned_grid(cells[:1], 1, image_side=40)
    assert WRONG not in {colour for _, colour in only_right.getcolors(10**6)}


def test_a_picture_is_saved_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.png"
    save_picture(Image.new("L", (2, 2), 7), path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="cannot write mode CMYK"):
        save_picture(Image.new("CMYK", (2, 2)), path)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["a.png"]
