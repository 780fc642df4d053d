"""Reference images and captions, from a data source or a file in COCO's layout, and files of prompts."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from lmfusion.data.config import SourceConfig
from lmfusion.data.pipeline.order import Permutation
from lmfusion.data.registry import load_source
from lmfusion.data.samples import CaptionedImage
from lmfusion.images.preprocessing import load_image
from lmfusion.utils.randomness import generator

COCO_DOWNLOADS = (
    "captions_val2014.json is in annotations_trainval2014.zip and the images are val2014.zip, both at "
    "https://cocodataset.org/#download; dataset_coco.json (Karpathy's split) is in caption_datasets.zip at "
    "https://cs.stanford.edu/people/karpathy/deepimagesent/"
)


@dataclass
class CocoConfig:
    """Images and captions in COCO's layout."""

    annotations: str
    """captions_val2014.json, Karpathy's dataset_coco.json, or a file of the same layout."""
    images: str
    """Folder of the images: val2014, or for dataset_coco.json the folder that holds val2014 and train2014."""
    split: str | None = None
    """Split of dataset_coco.json: "test", "val", "train" or "restval". captions_val2014.json has no splits."""


@dataclass
class ReferenceImage:
    """An image with its reference captions."""

    sample_id: str
    load_image: Callable[[], Image.Image]
    captions: tuple[str, ...]


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that are not blank, without a byte order mark. Raises ValueError unless it is UTF-8."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8 text, got {error}; save it as UTF-8") from error
    return [line for line in text.split("\n") if line.strip()]


def check_references(coco: CocoConfig | None, suite: str) -> None:
    """Raise ValueError if a file of `coco` is missing, saying where to get it. suite: its name, for the message."""
    for name in ("annotations", "images") if coco is not None else ():
        path = Path(getattr(coco, name))
        kind, is_there = ("folder", path.is_dir()) if name == "images" else ("file", path.is_file())
        if not is_there:
            raise ValueError(
                f"{suite}.coco.{name} must be an existing {kind}, got {path}; download it and give its path "
                f"({suite}.coco.{name}=PATH). {COCO_DOWNLOADS}"
            )


def load_references(source: SourceConfig | None, coco: CocoConfig | None, image_size: int) -> "References":
    """The references of a data source or of `coco`; exactly one of them is given.

    image_size: pixels on a side of images that a source renders. Raises ValueError for empty or damaged references.
    """
    if coco is not None:
        return References(read_coco(coco))
    assert source is not None
    return References(_Samples(load_source(source, image_size), source.name))


class References:
    """Reference images in their order, and random samples of them. Raises ValueError for an empty sequence."""

    def __init__(self, items: Sequence[ReferenceImage]) -> None:
        self._items = items
        if not len(items):
            raise ValueError("references must hold at least one image with captions, got none")

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> ReferenceImage:
        return self._items[index]

    def sample(self, count: int | None, seed: int) -> list[tuple[int, str]]:
        """`count` pairs of an image's index and one of its captions; None: as many as there are images.

        Images come in a random order by `seed`, none a second time before all have come once. Captions are random too.
        """
        count = len(self) if count is None else count
        orders: dict[int, Permutation] = {}
        pairs = []
        for position in range(count):
            epoch, offset = divmod(position, len(self))
            if epoch not in orders:
                orders[epoch] = Permutation(len(self), seed, epoch, "evaluation")
            index = orders[epoch][offset]
            captions = self[index].captions
            choice = int(generator(seed, epoch, self[index].sample_id, "caption").integers(len(captions)))
            pairs.append((index, captions[choice]))
        return pairs


class _Samples(Sequence[ReferenceImage]):
    """The samples of a data source. Raises ValueError for one that is not an image with captions of text."""

    def __init__(self, source: Any, name: str) -> None:
        self._source, self._name = source, name

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        sample = self._source[index]
        is_captioned = isinstance(sample, CaptionedImage) and all(isinstance(text, str) for text in sample.captions)
        if not is_captioned:
            raise ValueError(
                f"source {self._name} must hold images with captions, got {type(sample).__name__}; give another source"
            )
        return ReferenceImage(sample.sample_id, partial(_pixels, sample.load_image, sample.sample_id), sample.captions)


def _pixels(load: Callable[[], Any], name: str) -> Image.Image:
    image = load()
    if not isinstance(image, Image.Image):
        raise ValueError(f"{name} must be an image, got latents; give a source of images")
    return image


class _SplitError(ValueError):
    """A split that the file does not have. The layout of the file is right."""


def read_coco(config: CocoConfig) -> list[ReferenceImage]:
    """The images of an annotation file with their captions, in the order of the file.

    Raises ValueError for a file of another layout, for an unknown split, and if there are no images with captions.
    """
    path = Path(config.annotations)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        is_karpathy = "annotations" not in values
        read = _read_karpathy if is_karpathy else _read_captions
        found = read(values, config)
    except _SplitError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must hold COCO captions (`images` and `annotations`, or in Karpathy's layout `images` with "
            f"`sentences`), got {type(error).__name__}: {error}"
        ) from error
    if not found:
        in_split = f" in split {config.split!r}" if config.split else ""
        raise ValueError(f"{path} must hold at least one image with captions{in_split}, got none")
    return found


def _read_captions(values: dict[str, Any], config: CocoConfig) -> list[ReferenceImage]:
    """captions_val2014.json: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}."""
    if config.split is not None:
        raise _SplitError(
            f"coco.split must be left out because {config.annotations} has no splits, got {config.split!r}"
        )
    captions: dict[int, list[str]] = {}
    for annotation in values["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
    return [
        _reference(config, image["file_name"], captions[image["id"]])
        for image in values["images"]
        if image["id"] in captions
    ]


def _read_karpathy(values: dict[str, Any], config: CocoConfig) -> list[ReferenceImage]:
    """dataset_coco.json: {"images": [{"filepath", "filename", "split", "sentences": [{"raw"}]}]}."""
    splits = sorted({image["split"] for image in values["images"]})
    if config.split not in splits:
        raise _SplitError(
            f"coco.split must be one of {', '.join(splits)}, as in {config.annotations}, got {config.split!r}"
        )
    return [
        _reference(
            config,
            str(Path(image.get("filepath", ""), image["filename"])),
            [sentence["raw"].strip() for sentence in image["sentences"]],
        )
        for image in values["images"]
        if image["split"] == config.split
    ]


def _reference(config: CocoConfig, file: str, captions: Sequence[str]) -> ReferenceImage:
    folder = Path(config.images)
    return ReferenceImage(file, partial(load_image, folder / file), tuple(captions))
