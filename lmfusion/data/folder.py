"""A folder of your own images, with captions in .txt files beside them or in one metadata.jsonl."""

import json
from functools import partial
from pathlib import Path

from lmfusion.data.sources import CaptionedImage
from lmfusion.image.preprocessing import load_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class ImageFolder:
    """The source `folder`, read through its subfolders, in order of path.

    Captions come from `metadata.jsonl` at its top, if there is one: a line {"file_name": path in the folder, "text":
    caption or list of captions} for each image to use. Otherwise every image needs a file of the same name with the
    suffix .txt, with one caption a line.

    Raises ValueError, naming the sample, for a missing image, a missing or empty caption, or a line that is no such
    object. Images themselves are decoded when they are used.
    """

    def __init__(self, path: str | Path) -> None:
        self._folder = Path(path)
        if not self._folder.is_dir():
            raise ValueError(f"no folder of images at {path}")
        metadata = self._folder / "metadata.jsonl"
        samples = self._read_metadata(metadata) if metadata.is_file() else self._read_captions()
        if not samples:
            raise ValueError(f"no images in {path}; it needs some of {', '.join(SUFFIXES)}, with captions")
        self._samples = sorted(samples.items())

    @property
    def blocks(self) -> list[int]:
        return [len(self)]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> CaptionedImage:
        name, captions = self._samples[index]
        return CaptionedImage(name, partial(load_image, self._folder / name), captions)

    def _read_metadata(self, metadata: Path) -> dict[str, tuple[str, ...]]:
        samples: dict[str, tuple[str, ...]] = {}
        for number, line in enumerate(_read_lines(metadata), start=1):
            if not line.strip():
                continue
            where = f"{metadata}, line {number}"
            try:
                entry = json.loads(line)
                name, text = entry["file_name"], entry["text"]
                captions = [text] if isinstance(text, str) else list(text)
                if not isinstance(name, str) or not all(isinstance(caption, str) for caption in captions):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                raise ValueError(f'{where}: not an object like {{"file_name": "cat.png", "text": "a cat"}}') from None
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{where}: file_name {name!r} leads out of the folder; name it relative to the folder")
            name = Path(name).as_posix()  # "./cat.png" is "cat.png"
            if name in samples:
                raise ValueError(f"{where}: {name} is listed twice; give its captions as one list")
            if not (self._folder / name).is_file():
                raise ValueError(f"{where}: there is no image {self._folder / name}")
            samples[name] = _checked(captions, f"{where} ({name})")
        return samples

    def _read_captions(self) -> dict[str, tuple[str, ...]]:
        samples: dict[str, tuple[str, ...]] = {}
        for image in self._folder.rglob("*"):
            if image.suffix.lower() not in SUFFIXES:
                continue
            text = image.with_suffix(".txt")
            if not text.is_file():
                raise ValueError(f"{image} has no caption; write {text.name} beside it, or use a metadata.jsonl")
            lines = [line for line in _read_lines(text) if line.strip()]
            samples[image.relative_to(self._folder).as_posix()] = _checked(lines, str(text))
        return samples


def _read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file, ended by newlines alone: captions may hold other separators."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _checked(captions: list[str], where: str) -> tuple[str, ...]:
    if not captions or not all(caption.strip() for caption in captions):
        raise ValueError(f"{where}: the caption is empty; write one, or leave the image out")
    return tuple(captions)
