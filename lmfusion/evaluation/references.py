"""Which images and captions is a model compared with? Those of a data source, or of a file in COCO's layout.

Files of prompts, one a line, are read here too.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from lmfusion.data.pipeline.order import Permutation
from lmfusion.data.config import SourceConfig
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
    """Images and captions as COCO has them."""

    annotations: str
    """captions_val2014.json, or Karpathy's dataset_coco.json, or a file of the same layout."""
    images: str
    """The folder of the images: val2014; for dataset_coco.json the folder that holds val2014 and train2014."""
    split: str | None = None
    """Of dataset_coco.json: "test", "val", "train" or "restval". captions_val2014.json has none."""


@dataclass
class Reference:
    """An image of the reference."""

    sample_id: str
    load_image: Callable[[], Image.Image]
    captions: tuple[str, ...]


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that hold something, without a byte order mark. Raises ValueError unless it is UTF-8."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}); save it as UTF-8") from error
    return [line for line in text.split("\n") if line.strip()]


def check_references(coco: CocoConfig | None, suite: str) -> None:
    """Raise ValueError, with the way out, where the files of `coco` are not there. suite: its name, for the message."""
    for name in ("annotations", "images") if coco is not None else ():
        path = Path(getattr(coco, name))
        kind, is_there = ("folder", path.is_dir()) if name == "images" else ("file", path.is_file())
        if not is_there:
            raise ValueError(
                f"{suite}.coco.{name} is {path}, and there is no such {kind}; download it and give its place "
                f"({suite}.coco.{name}=PATH). {COCO_DOWNLOADS}"
            )


def load_references(source: SourceConfig | None, coco: CocoConfig | None, image_size: int) -> "References":
    """The references of a data source or of `coco`, of which one is given. image_size: that drawings are made at.

    Raises ValueError where there are none, or they are damaged.
    """
    if coco is not None:
        return References(read_coco(coco))
    assert source is not None
    return References(_Samples(load_source(source, image_size), source.name))


class References:
    """References in their order, and some drawn by chance."""

    def __init__(self, items: Sequence[Reference]) -> None:
        self._items = items
        if not len(items):
            raise ValueError("the references are empty; give some images with captions")

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Reference:
        return self._items[index]

    def draw(self, count: int | None, seed: int) -> list[tuple[int, str]]:
        """`count` pairs of an index and one of its captions; None: as many as there are images.

        Images come in an order drawn with `seed`, none twice before all have come once; so does the caption of each.
        """
        count = len(self) if count is None else count
        orders: dict[int, Permutation] = {}
        pairs = []
        for position in range(count):
            turn, place = divmod(position, len(self))
            if turn not in orders:
                orders[turn] = Permutation(len(self), seed, turn, "evaluation")
            index = orders[turn][place]
            captions = self[index].captions
            choice = int(generator(seed, turn, self[index].sample_id, "caption").integers(len(captions)))
            pairs.append((index, captions[choice]))
        return pairs


class _Samples(Sequence[Reference]):
    """The samples of a data source. Raises ValueError for one that is no image with captions in words."""

    def __init__(self, source: Any, name: str) -> None:
        self._source, self._name = source, name

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        sample = self._source[index]
        is_captioned = isinstance(sample, CaptionedImage) and all(isinstance(text, str) for text in sample.captions)
        if not is_captioned:
            raise ValueError(
                f"{self._name} holds samples that are no images with captions; give another source to compare with"
            )
        return Reference(sample.sample_id, partial(_picture, sample.load_image, sample.sample_id), sample.captions)


def _picture(load: Callable[[], Any], name: str) -> Image.Image:
    image = load()
    if not isinstance(image, Image.Image):
        raise ValueError(f"{name} holds latents; give a source of images to compare with")
    return image


def read_coco(config: CocoConfig) -> list[Reference]:
    """The images of a file of annotations with their captions, in the file's order.

    Raises ValueError for a file that is no such JSON, for a split that it does not have, and for no images.
    """
    path = Path(config.annotations)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        is_karpathy = "annotations" not in values
        read = _read_karpathy if is_karpathy else _read_captions
        found = read(values, config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ValueError) and str(error).startswith(_SPLIT_ERROR):
            raise
        raise ValueError(
            f"{path} is no file of COCO's captions ({type(error).__name__}: {error}); it holds `images` and "
            "`annotations`, or, in Karpathy's layout, `images` with `sentences`"
        ) from error
    if not found:
        raise ValueError(f"{path} has no image with captions" + (f" in split {config.split!r}" if config.split else ""))
    return found


_SPLIT_ERROR = "coco.split"


def _read_captions(values: dict[str, Any], config: CocoConfig) -> list[Reference]:
    """captions_val2014.json: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}."""
    if config.split is not None:
        raise ValueError(f"{_SPLIT_ERROR} is {config.split!r}, but {config.annotations} has no splits; leave it out")
    captions: dict[int, list[str]] = {}
    for annotation in values["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
    return [
        _reference(config, image["file_name"], captions[image["id"]])
        for image in values["images"]
        if image["id"] in captions
    ]


def _read_karpathy(values: dict[str, Any], config: CocoConfig) -> list[Reference]:
    """dataset_coco.json: {"images": [{"filepath", "filename", "split", "sentences": [{"raw"}]}]}."""
    splits = sorted({image["split"] for image in values["images"]})
    if config.split not in splits:
        raise ValueError(f"{_SPLIT_ERROR} is {config.split!r}; {config.annotations} has {', '.join(splits)}")
    return [
        _reference(
            config,
            str(Path(image.get("filepath", ""), image["filename"])),
            [sentence["raw"].strip() for sentence in image["sentences"]],
        )
        for image in values["images"]
        if image["split"] == config.split
    ]


def _reference(config: CocoConfig, file: str, captions: Sequence[str]) -> Reference:
    folder = Path(config.images)
    return Reference(file, partial(load_image, folder / file), tuple(captions))
