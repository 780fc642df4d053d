"""Which digit does a picture show? A support vector machine trained on the real training digits is asked."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from lmfusion.synthetic.digits import Digits


class Judge:
    """A classifier of 8 x 8 pictures of digits, trained on the training split alone."""

    def __init__(self) -> None:
        from sklearn.svm import SVC

        digits = Digits("train")
        self._classifier = SVC(gamma="scale", C=10.0)
        self._classifier.fit(_features(pictures(digits)), digits.labels)

    def read(self, images: Sequence[Image.Image]) -> list[int]:
        """The digit that each picture shows, by the classifier."""
        return [int(label) for label in self._classifier.predict(_features(images))] if images else []


def pictures(digits: Digits) -> list[Image.Image]:
    """All of them, 8 x 8."""
    images = [sample.load_image() for sample in map(digits.__getitem__, range(len(digits)))]
    return [image for image in images if isinstance(image, Image.Image)]


def _features(images: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image.convert("L"), np.float64).reshape(-1) / 255 for image in images])
