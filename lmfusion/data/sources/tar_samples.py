"""Groups the members of a tar into samples, and reads their captions.

1. Members belong together that have the same name up to its first dot, as webdataset has it: `0001.jpg`, `0001.txt` and
   `0001.seg.png`. Capitals in suffixes do not matter.
2. Where a name has several dots, and an image and a caption have the same name up to their suffixes, these two are a
   sample of their own: `v1.2_cat.png` and `v1.2_cat.txt`. `v1.2_cat.seg.png` belongs to it.
3. An image or a caption with several dots in its name that neither rule pairs with its other half becomes a sample
   named up to the last suffix. It is damaged, because half of it is missing.

Every file that looks like an image or a caption is accounted for: it belongs to a sample or to a damaged sample, or it
is counted as unused. Hidden files (`._cat.jpg`) and files in `__MACOSX` are ignored.
"""

import hashlib
import re
from typing import NamedTuple

from lmfusion.data.sources.captions import MAX_TEXT_BYTES, captions_of_json, captions_of_text
from lmfusion.data.sources.unused_files import (
    NO_IMAGE,
    SECOND_CAPTION,
    SECOND_IMAGE,
    UNREAD_SUFFIXES,
    Unused,
    UnusedFiles,
    looks_like_caption,
    looks_like_image,
    suffix_of,
    unread_kind,
)
from lmfusion.data.storage.files import StoredFile
from lmfusion.data.storage.tar import DamagedTarError, Member, TarReader
from lmfusion.utils.printing import printable

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CAPTION_SUFFIXES = ("txt", "json")
"""Where both are, the text counts."""

_NAME = re.compile(r"((?:.*/)?[^./][^/.]*)\.([^/]+)", re.DOTALL)
_LINK = "links and other members that are no files, which are not followed in a tar"
_OTHER = "images of another suffix than the one that was asked for"


class Choice(NamedTuple):
    """Which members are images and captions."""

    images: tuple[str, ...]
    captions: tuple[str, ...]
    key: str | None
    """Of the JSON object."""
    is_named: tuple[bool, bool]
    """Whether the user named the suffix of images, and that of captions. Then nothing else of a sample is wanted."""

    @classmethod
    def of(cls, image: str | None, caption: str | None) -> "Choice":
        """image, caption: as `WebDataset` takes them. Raises ValueError for an empty suffix."""
        images = IMAGE_SUFFIXES if image is None else (image.lstrip(".").lower(),)
        suffix, _, key = (caption or "").lstrip(".").partition(":")
        captions = CAPTION_SUFFIXES if caption is None else (suffix.lower(),)
        if not (images[0] and captions[0]):
            raise ValueError("image and caption are suffixes of members, such as jpg and txt; they cannot be empty")
        return cls(images, captions, key or None, (image is not None, caption is not None))

    @property
    def digest(self) -> str:
        """Tells choices apart, in the names of indexes."""
        return hashlib.blake2b(repr((self.images, self.captions, self.key)).encode(), digest_size=4).hexdigest()

    def ending(self, path: str) -> str | None:
        """The suffix of an image or a caption that a name ends with; the longest, where there are several."""
        fitting = [s for s in self.images + self.captions if path[-len(s) - 1 :].lower() == f".{s}"]
        return max(fitting, key=len, default=None)

    def captions_of(self, suffix: str, data: bytes) -> tuple[str, ...]:
        """What a member of that suffix holds. Raises ValueError where that is no caption."""
        if self.key is not None or suffix.rpartition(".")[2] == "json":
            return captions_of_json(data, self.key)
        return captions_of_text(data)


class Record(NamedTuple):
    """A sample, good or damaged, as the index holds it."""

    key: str
    """"" for what is wrong with the tar itself."""
    captions: tuple[str, ...]
    reason: str | None
    """What is wrong with it."""
    offset: int = 0
    size: int = 0
    """Of the image, in bytes."""


class _Found(NamedTuple):
    """A member, and the two ways to read its name."""

    path: str
    key: str
    """The name up to its first dot."""
    suffix: str
    """What follows, in small letters."""
    stem: str
    """The name up to the suffix of an image or a caption that it ends with; "" where there is none."""
    ending: str
    """That suffix."""
    member: Member
    captions: tuple[str, ...] | str
    """A text is the reason why there are none."""


class _Parts(NamedTuple):
    """What was found of one sample: members by their suffixes within it, in their order."""

    members: list[tuple[str, _Found]]

    def first(self, suffixes: tuple[str, ...]) -> _Found | None:
        """The member of the first of `suffixes` that is there."""
        by_suffix = dict(self.members)
        return next((by_suffix[suffix] for suffix in suffixes if suffix in by_suffix), None)


def index_tar(file: StoredFile, choice: Choice) -> tuple[list[Record], list[Unused]]:
    """The samples of a tar in order of their first members, at last what is wrong with the tar, and what is not used.

    Raises StorageError where the tar cannot be read.
    """
    reader = TarReader(file)
    found: list[_Found] = []
    problem = None
    try:
        for member in reader.members():
            if (named := _find(reader, member, choice)) is not None:
                found.append(named)
    except DamagedTarError as error:
        problem = str(error)
    samples = _group(found, choice)
    if problem is not None and samples:
        key = next(reversed(samples))
        if not all(samples[key].first(suffixes) for suffixes in (choice.images, choice.captions)):
            samples.pop(key)  # the tar broke off in it, which is no further damage
    unused = UnusedFiles()
    records = []
    for key, parts in samples.items():
        record = _record(key, parts, choice)
        if record is not None:
            records.append(record)
        _count_unused(parts, record, choice, unused)
    for name in reader.passed_over:
        if _split(name) and (looks_like_image(name) or looks_like_caption(name)):
            unused.add(_LINK, printable(name))
    if problem is None and not records:
        problem = f"holds no {', '.join(choice.images)} with captions"
    if problem is not None:
        records.append(Record("", (), f"the tar {problem}"))
    return records, unused.list()


def _split(name: str) -> tuple[str, str] | None:
    """A member's name up to its first dot, and what follows; None without a suffix, and for what macOS adds."""
    while name.startswith("./"):
        name = name[2:]
    match = _NAME.fullmatch(name)
    return None if match is None or "__MACOSX" in match[1].split("/")[:-1] else (match[1], match[2])


def _find(reader: TarReader, member: Member, choice: Choice) -> _Found | None:
    split = _split(member.name)
    if split is None:
        return None
    path, suffix = ".".join(split), split[1].lower()
    ending = choice.ending(path) or ""
    captions: tuple[str, ...] | str = ()
    if suffix in choice.captions or ending in choice.captions:
        captions = _read_captions(reader, member, suffix if suffix in choice.captions else ending, choice)
    return _Found(path, split[0], suffix, path[: -len(ending) - 1] if ending else "", ending, member, captions)


def _read_captions(reader: TarReader, member: Member, suffix: str, choice: Choice) -> tuple[str, ...] | str:
    if member.size > MAX_TEXT_BYTES:
        return f".{suffix} has {member.size} bytes; the limit is {MAX_TEXT_BYTES}"
    data = reader.read(member.offset, member.size)
    try:
        return choice.captions_of(suffix, data)
    except ValueError as error:
        return f".{suffix}: {error}"


def _group(found: list[_Found], choice: Choice) -> dict[str, _Parts]:
    """Samples by name, in order of their first members."""
    chosen = choice.images + choice.captions
    has_own = {item.key for item in found if item.suffix in chosen}
    endings: dict[str, set[str]] = {}
    for item in found:
        if item.ending and item.suffix not in chosen:
            endings.setdefault(item.stem, set()).add(item.ending)
    pairs = {stem for stem, of in endings.items() if of & {*choice.images} and of & {*choice.captions}}
    samples: dict[str, _Parts] = {}
    for item in found:
        key, suffix = item.key, item.suffix
        if suffix not in chosen:
            if pair := _longest_start(item.path, pairs):
                key, suffix = pair, item.path[len(pair) + 1 :].lower()
            elif item.ending and key not in has_own:
                key, suffix = item.stem, item.ending
        samples.setdefault(key, _Parts([])).members.append((suffix, item))
    return samples


def _longest_start(path: str, stems: set[str]) -> str | None:
    """The longest of `stems` that a name begins with, up to one of its dots."""
    dots = (i for i in range(len(path) - 1, 0, -1) if path[i] == ".")
    return next((path[:i] for i in dots if path[:i] in stems), None) if stems else None


def _record(key: str, parts: _Parts, choice: Choice) -> Record | None:
    """The sample of that name; None where it has neither image nor caption."""
    image, caption = parts.first(choice.images), parts.first(choice.captions)
    if image is None and caption is None:
        return None
    key = printable(key)
    suffixes = [suffix for suffix, _ in parts.members]
    there = f"only {printable(', '.join(suffixes))}"
    if len(set(suffixes)) < len(suffixes):
        return Record(key, (), "a member of the same name is in the tar twice")
    if image is None:
        return Record(key, (), f"no image ({', '.join(choice.images)}) in the tar, {there}")
    if caption is None:
        return Record(key, (), f"no caption ({', '.join(choice.captions)}) in the tar, {there}")
    if isinstance(caption.captions, str):
        return Record(key, (), printable(caption.captions))
    return Record(key, caption.captions, None, image.member.offset, image.member.size)


def _count_unused(parts: _Parts, record: Record | None, choice: Choice, unused: UnusedFiles) -> None:
    """Count what looks like an image or a caption and is in no sample. A damaged sample names what it has by itself."""
    if record is not None and record.reason is not None:
        return
    used = [] if record is None else [parts.first(choice.images), parts.first(choice.captions)]
    for _, item in parts.members:
        name = item.member.name
        if any(item is other for other in used):
            continue
        if looks_like_image(name) and (record is None or not choice.is_named[0]):
            is_unread = suffix_of(name) in UNREAD_SUFFIXES
            unused.add(unread_kind(name) if is_unread else SECOND_IMAGE if record else _OTHER, printable(name))
        elif looks_like_caption(name) and (record is None or not choice.is_named[1]):
            unused.add(SECOND_CAPTION if record else NO_IMAGE, printable(name))
