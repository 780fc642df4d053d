"""Handwritten digits that come with scikit-learn: 1,797 images of 8 x 8, captioned in words."""

from functools import cache, partial

import numpy as np
from PIL import Image

from lmfusion.data.sources import CaptionedImage, split_indices

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def caption_of(digit: int) -> str:
    """The words a digit is drawn by, and described with."""
    return f"a handwritten {NAMES[digit]}"


class Digits:
    """The source `digits`. One image in five is held out, always the same ones: split "test"."""

    def __init__(self, split: str = "train") -> None:
        self._images, self._labels = _load()
        self._indices = split_indices(len(self._labels), split, held_out=0.2)

    @property
    def labels(self) -> list[int]:
        """The digit of every sample."""
        return [int(self._labels[i]) for i in self._indices]

    @property
    def blocks(self) -> list[int]:
        return [len(self)]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> CaptionedImage:
        i = self._indices[index]
        image = partial(Image.fromarray, self._images[i])
        return CaptionedImage(f"digits/{i}", image, (caption_of(int(self._labels[i])),))


@cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    """uint8 images [1797, 8, 8] and their digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the digits need scikit-learn, which is not installed; pip install scikit-learn") from None
    bunch = load_digits()  # 0 to 16
    return (bunch.images * (255 / 16)).round().astype(np.uint8), bunch.target
