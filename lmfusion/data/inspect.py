"""Inspects a data set for `lmfusion data`: counts it, finds damage, measures an epoch, and shows samples."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from lmfusion.data.pipeline.documents import SkippedSample
from lmfusion.data.pipeline.order import Permutation
from lmfusion.data.pipeline.packing import WindowReader
from lmfusion.data.samples import CaptionedImage, Latents, LoadImage, Sample, Source, Text, parts_of
from lmfusion.utils.prefetch import map_threads

CHUNK_SAMPLES = 32
"""Samples that one thread reads at a time."""

DecodeLatents = Callable[[Latents], Image.Image]
DecodeTokens = Callable[[np.ndarray], str]
Report = Callable[[int], object]
"""Called with the number of samples that were finished since the last call."""


_NAME = re.compile(r"^[^:]*[./][^:]*: ")
"""The name of a file or sample at the beginning of a reason."""


@dataclass
class Contents:
    """What was found in a source."""

    num_samples: int = 0
    """Including the damaged ones."""
    num_images: int = 0
    num_texts: int = 0
    """Captions, and texts of interleaved documents."""
    num_characters: int = 0
    """Of the texts; token ids count 0."""
    damaged: list[SkippedSample] = field(default_factory=list)

    def add(self, other: "Contents") -> None:
        self.num_samples += other.num_samples
        self.num_images += other.num_images
        self.num_texts += other.num_texts
        self.num_characters += other.num_characters
        self.damaged += other.damaged


@dataclass
class Epoch:
    """What training reads in one epoch of a mixture: each of its samples once, on average."""

    num_samples: int
    """Of all sources."""
    num_read: int
    """Samples that were read, in whole windows. The other numbers are scaled from them."""
    num_text_tokens: float
    """Captions, texts, markers and bos."""
    num_image_tokens: float
    num_sequences: float
    seq_len: int
    num_cut: float
    """Documents cut to fit into a sequence."""
    num_damaged: float
    """Samples without usable text; images are not read."""

    @property
    def num_tokens(self) -> float:
        return self.num_text_tokens + self.num_image_tokens

    @property
    def packing(self) -> float:
        """Share of the positions of sequences that hold a token."""
        return self.num_tokens / max(1.0, self.num_sequences * self.seq_len)


def read_all(
    source: Source, name: str, *, load_images: bool, num_workers: int, report: Report = lambda _: None
) -> Contents:
    """Read a whole source, in its order: only its texts, or every image too.

    name: of the source, for damaged samples without a name. The result does not depend on `num_workers`.
    """
    contents = Contents()
    ranges = (range(i, min(i + CHUNK_SAMPLES, len(source))) for i in range(0, len(source), CHUNK_SAMPLES))
    for part in map_threads(partial(_read_some, source, name, load_images), ranges, num_workers):
        contents.add(part)
        report(part.num_samples)
    return contents


def measure_epoch(
    reader: WindowReader,
    num_samples: int,
    seq_len: int,
    pack_window: int,
    *,
    max_samples: int | None = None,
    report: Report = lambda _: None,
) -> Epoch:
    """Plan the sequences of an epoch as training does, without reading an image.

    num_samples: of all sources. max_samples: at least this number is read, and the rest is assumed to be like it.
    """
    num_windows = -(-min(num_samples, max_samples or num_samples) // pack_window)
    num_text = num_image = num_sequences = num_cut = num_damaged = 0
    for number in range(num_windows):
        window = reader.read(number)
        num_sequences += len(window.sequences)
        num_damaged += len(window.damaged)
        for sequence in window.sequences:
            num_in_text = sum(len(plan.document.token_ids) for plan in sequence.plans)
            num_text += num_in_text
            num_image += sequence.num_tokens_used - num_in_text
            num_cut += sequence.num_cut
        report(pack_window)
    num_read = num_windows * pack_window
    scale = num_samples / num_read
    return Epoch(
        num_samples=num_samples,
        num_read=num_read,
        num_text_tokens=scale * num_text,
        num_image_tokens=scale * num_image,
        num_sequences=scale * num_sequences,
        seq_len=seq_len,
        num_cut=scale * num_cut,
        num_damaged=scale * num_damaged,
    )


def by_reason(damaged: Sequence[SkippedSample]) -> list[tuple[str, list[SkippedSample]]]:
    """Damaged samples grouped by reason, without names and numbers in it, the most frequent reason first."""
    kinds: dict[str, list[SkippedSample]] = {}
    for sample in damaged:
        kinds.setdefault(_kind(sample), []).append(sample)
    return sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0]))


def contact_sheet(
    source: Source,
    num_samples: int,
    *,
    seed: int = 0,
    cell: int = 192,
    num_columns: int = 6,
    decode_latents: DecodeLatents | None = None,
    decode_tokens: DecodeTokens | None = None,
) -> Image.Image:
    """A picture of `num_samples` random samples, with their captions below them.

    cell: side in pixels of each image, cropped as in training. Each image of an interleaved document is a cell, with
    the text before it; damaged samples are cells with the reason. decode_latents, decode_tokens: make images and texts
    of the contents of a latent cache. Raises ValueError where these are needed but not given.
    """
    order = Permutation(len(source), seed, 0, "contact sheet")
    chosen = order.take(np.arange(min(num_samples, len(source)))).tolist()
    cells = [c for index in chosen for c in _cells(source, index, cell, decode_latents, decode_tokens)]
    font = ImageFont.load_default(12)
    line_height, gap, num_lines = 15, 6, 4
    height = cell + num_lines * line_height + 2 * gap
    num_columns = min(num_columns, len(cells))
    num_rows = -(-len(cells) // num_columns)
    sheet = Image.new("RGB", (num_columns * (cell + gap) + gap, num_rows * height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(cells):
        x, y = gap + i % num_columns * (cell + gap), gap + i // num_columns * height
        sheet.paste(image, (x, y))
        for j, line in enumerate(_wrap(text, font, cell, num_lines)):
            draw.text((x, y + cell + 2 + j * line_height), line, fill="black", font=font)
    return sheet


def _read_some(source: Source, name: str, load_images: bool, indices: range) -> Contents:
    contents = Contents(num_samples=len(indices))
    for index in indices:
        sample_id = f"{name}, sample {index}"
        try:
            sample = source[index]
            sample_id = sample.sample_id
            images, texts = _parts(sample)
            if load_images:
                for load_image in images:
                    load_image()
        except (ValueError, OSError) as error:
            contents.damaged.append(SkippedSample(sample_id, str(error)))
            continue
        contents.num_images += len(images)
        contents.num_texts += len(texts)
        contents.num_characters += sum(len(text) for text in texts if isinstance(text, str))
    return contents


def _parts(sample: Sample) -> tuple[list[LoadImage], list[Text]]:
    parts = parts_of(sample)
    return [p for p in parts if callable(p)], [p for p in parts if isinstance(p, (str, np.ndarray))]


def describe_damaged(sample: SkippedSample) -> str:
    """How a list below a reason names the sample: by its id, and by the reason, too, where that names another file."""
    sample_id, reason = sample
    if sample_id in reason:
        return sample_id
    return reason if _NAME.match(reason) else f"{sample_id}: {reason}"


def _kind(sample: SkippedSample) -> str:
    sample_id, reason = sample
    reason = re.sub(rf"'\S*{re.escape(sample_id)}'|\S*{re.escape(sample_id)}", "the sample", reason)
    reason = _NAME.sub("", reason)
    reason = re.sub(r"\S*/\S+|(?!metadata\.jsonl)\b\S+\.(txt|jsonl?|jpe?g|png|webp|tar|parquet)\b", "a file", reason)
    return re.sub(r"(?<![\w\\-])\d+", "N", reason)  # except the 8 of UTF-8


def _cells(
    source: Source,
    index: int,
    size: int,
    decode_latents: DecodeLatents | None,
    decode_tokens: DecodeTokens | None,
) -> Iterator[tuple[Image.Image, str]]:
    def text_of(text: Text) -> str:
        if isinstance(text, str):
            return text
        if decode_tokens is None:
            raise _NeedsModelError
        return decode_tokens(text)

    def image_of(load_image: LoadImage) -> Image.Image:
        image = load_image()
        if isinstance(image, Latents):
            if decode_latents is None:
                raise _NeedsModelError
            image = decode_latents(image)
        return ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)

    try:
        sample = source[index]
        if isinstance(sample, CaptionedImage):
            yield image_of(sample.load_image), " | ".join(map(text_of, sample.captions))
            return
        before = ""
        for part in parts_of(sample):
            if callable(part):
                yield image_of(part), before
                before = ""
            else:
                before = f"{before} {text_of(part)}".strip()
        if before:
            yield Image.new("RGB", (size, size), "white"), before
    except _NeedsModelError:
        raise ValueError("latents and token ids need a codec and tokenizer to be shown; give a recipe") from None
    except (ValueError, OSError) as error:
        yield Image.new("RGB", (size, size), "lightgray"), f"DAMAGED: {error}"


class _NeedsModelError(Exception):
    pass


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, num_lines: int) -> list[str]:
    """The first `num_lines` lines of a text, each at most `width` pixels wide; long words are split."""
    characters = " ".join(text.split())[: num_lines * width]
    lines: list[str] = []
    while characters and len(lines) < num_lines:
        length = len(characters)
        while length > 1 and font.getlength(characters[:length]) > width:
            length -= max(1, length // 16)
        space = characters.rfind(" ", 0, length)
        if length < len(characters) and space > length // 2:
            length = space + 1
        lines.append(characters[:length].rstrip())
        characters = characters[length:]
    if characters and lines:
        lines[-1] = lines[-1][:-3] + "..."
    return lines
