"""Classifies images of digits with a support vector machine that is trained on the real training digits."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from lmfusion.synthetic.digits import Digits


class DigitClassifier:
    """A classifier of 8 x 8 images of digits, trained only on the training split."""

    def __init__(self) -> None:
        from sklearn.svm import SVC

        digits = Digits("train")
        self._classifier = SVC(gamma="scale", C=10.0)
        self._classifier.fit(_features(images_of(digits)), digits.labels)

    def classify(self, images: Sequence[Image.Image]) -> list[int]:
        """The digit that each image shows."""
        return [int(label) for label in self._classifier.predict(_features(images))] if images else []


def images_of(digits: Digits) -> list[Image.Image]:
    """All images of a split, 8 x 8."""
    images = [sample.load_image() for sample in map(digits.__getitem__, range(len(digits)))]
    return [image for image in images if isinstance(image, Image.Image)]


def _features(images: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image.convert("L"), np.float64).reshape(-1) / 255 for image in images])
