"""Groups the members of a tar into samples, and reads their captions.

1. Members with the same name up to its first dot belong together, as in webdataset: `0001.jpg`, `0001.txt` and
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
    UnusedFiles,
    UnusedKind,
    looks_like_caption,
    looks_like_image,
    suffix_of,
    unread_kind,
)
from lmfusion.data.storage.files import StoredFile
from lmfusion.data.storage.tar import DamagedTarError, Member, TarReader
from lmfusion.images.formats import IMAGE_SUFFIXES, UNREAD_SUFFIXES
from lmfusion.utils.printing import printable

DEFAULT_CAPTION_SUFFIXES = ("txt", "json")
"""A sample with both has its captions from the .txt."""

_NAME = re.compile(r"((?:.*/)?[^./][^/.]*)\.([^/]+)", re.DOTALL)
_LINK = "links and other members that are not files; links in a tar are not followed"
_OTHER = "images with another suffix than the one that was chosen"


class MemberSelection(NamedTuple):
    """Which members are images and captions."""

    images: tuple[str, ...]
    captions: tuple[str, ...]
    key: str | None
    """Of the JSON object."""
    is_named: tuple[bool, bool]
    """Whether the user named the suffix of images, and that of captions. Other members are then unused on purpose."""

    @classmethod
    def parse(cls, image: str | None, caption: str | None) -> "MemberSelection":
        """image, caption: as `WebDataset` takes them. Raises ValueError for an empty suffix."""
        images = IMAGE_SUFFIXES if image is None else (image.lstrip(".").lower(),)
        suffix, _, key = (caption or "").lstrip(".").partition(":")
        captions = DEFAULT_CAPTION_SUFFIXES if caption is None else (suffix.lower(),)
        if not (images[0] and captions[0]):
            raise ValueError("image and caption must be suffixes of members, such as jpg and txt, got an empty text")
        return cls(images, captions, key or None, (image is not None, caption is not None))

    @property
    def digest(self) -> str:
        """Distinguishes selections in the names of indexes."""
        return hashlib.blake2b(repr((self.images, self.captions, self.key)).encode(), digest_size=4).hexdigest()

    def ending(self, path: str) -> str | None:
        """The suffix of an image or a caption that a name ends with: the longest, if there are several."""
        fitting = [s for s in self.images + self.captions if path[-len(s) - 1 :].lower() == f".{s}"]
        return max(fitting, key=len, default=None)

    def captions_of(self, suffix: str, data: bytes) -> tuple[str, ...]:
        """The captions in a member with that suffix. Raises ValueError where it holds none."""
        if self.key is not None or suffix.rpartition(".")[2] == "json":
            return captions_of_json(data, self.key)
        return captions_of_text(data)


class Record(NamedTuple):
    """A sample, good or damaged, as the index holds it."""

    key: str
    """"" for damage to the tar itself."""
    captions: tuple[str, ...]
    reason: str | None
    """What is wrong with the sample; None: nothing."""
    offset: int = 0
    size: int = 0
    """Of the image, in bytes."""


class _NamedMember(NamedTuple):
    """A member, with its name split in two ways."""

    path: str
    key: str
    """The name up to its first dot."""
    suffix: str
    """What follows, in lower case."""
    stem: str
    """The name without the suffix of an image or caption at its end; "" where there is no such suffix."""
    ending: str
    """That suffix."""
    member: Member
    captions: tuple[str, ...] | str
    """A text is the reason why there are none."""


class _SampleMembers(NamedTuple):
    """The members of one sample, each with its suffix within the sample, in their order."""

    members: list[tuple[str, _NamedMember]]

    def first(self, suffixes: tuple[str, ...]) -> _NamedMember | None:
        """The member of the first of `suffixes` that is there."""
        by_suffix = dict(self.members)
        return next((by_suffix[suffix] for suffix in suffixes if suffix in by_suffix), None)


def index_tar(file: StoredFile, selection: MemberSelection) -> tuple[list[Record], list[UnusedKind]]:
    """The samples of a tar in order of their first members, a last one if the tar is damaged, and the unused members.

    Raises StorageError where the tar cannot be read.
    """
    reader = TarReader(file)
    found: list[_NamedMember] = []
    problem = None
    try:
        for member in reader.members():
            if (named := _find(reader, member, selection)) is not None:
                found.append(named)
    except DamagedTarError as error:
        problem = str(error)
    samples = _group(found, selection)
    if problem is not None and samples:
        key = next(reversed(samples))
        if not all(samples[key].first(suffixes) for suffixes in (selection.images, selection.captions)):
            samples.pop(key)  # the tar ends inside it; the damage to the tar is already reported
    unused = UnusedFiles()
    records = []
    for key, parts in samples.items():
        record = _record(key, parts, selection)
        if record is not None:
            records.append(record)
        _count_unused(parts, record, selection, unused)
    for name in reader.skipped_members:
        if _split(name) and (looks_like_image(name) or looks_like_caption(name)):
            unused.add(_LINK, printable(name))
    if problem is None and not records:
        problem = f"holds no {', '.join(selection.images)} with captions"
    if problem is not None:
        records.append(Record("", (), f"the tar {problem}"))
    return records, unused.list()


def _split(name: str) -> tuple[str, str] | None:
    """A member's name up to its first dot, and what follows; None without a suffix, and for files that macOS adds."""
    while name.startswith("./"):
        name = name[2:]
    match = _NAME.fullmatch(name)
    return None if match is None or "__MACOSX" in match[1].split("/")[:-1] else (match[1], match[2])


def _find(reader: TarReader, member: Member, selection: MemberSelection) -> _NamedMember | None:
    split = _split(member.name)
    if split is None:
        return None
    path, suffix = ".".join(split), split[1].lower()
    ending = selection.ending(path) or ""
    captions: tuple[str, ...] | str = ()
    if suffix in selection.captions or ending in selection.captions:
        captions = _read_captions(reader, member, suffix if suffix in selection.captions else ending, selection)
    return _NamedMember(path, split[0], suffix, path[: -len(ending) - 1] if ending else "", ending, member, captions)


def _read_captions(reader: TarReader, member: Member, suffix: str, selection: MemberSelection) -> tuple[str, ...] | str:
    if member.size > MAX_TEXT_BYTES:
        return f".{suffix} must have at most {MAX_TEXT_BYTES} bytes, got {member.size}"
    data = reader.read(member.offset, member.size)
    try:
        return selection.captions_of(suffix, data)
    except ValueError as error:
        return f".{suffix}: {error}"


def _group(found: list[_NamedMember], selection: MemberSelection) -> dict[str, _SampleMembers]:
    """Samples by name, in order of their first members."""
    chosen = selection.images + selection.captions
    has_own = {item.key for item in found if item.suffix in chosen}
    endings: dict[str, set[str]] = {}
    for item in found:
        if item.ending and item.suffix not in chosen:
            endings.setdefault(item.stem, set()).add(item.ending)
    pairs = {stem for stem, of in endings.items() if of & {*selection.images} and of & {*selection.captions}}
    samples: dict[str, _SampleMembers] = {}
    for item in found:
        key, suffix = item.key, item.suffix
        if suffix not in chosen:
            if pair := _longest_start(item.path, pairs):
                key, suffix = pair, item.path[len(pair) + 1 :].lower()
            elif item.ending and key not in has_own:
                key, suffix = item.stem, item.ending
        samples.setdefault(key, _SampleMembers([])).members.append((suffix, item))
    return samples


def _longest_start(path: str, stems: set[str]) -> str | None:
    """The longest of `stems` that a name begins with, up to one of its dots."""
    dots = (i for i in range(len(path) - 1, 0, -1) if path[i] == ".")
    return next((path[:i] for i in dots if path[:i] in stems), None) if stems else None


def _record(key: str, parts: _SampleMembers, selection: MemberSelection) -> Record | None:
    """The sample of that name; None where it has neither image nor caption."""
    image, caption = parts.first(selection.images), parts.first(selection.captions)
    if image is None and caption is None:
        return None
    key = printable(key)
    suffixes = [suffix for suffix, _ in parts.members]
    there = f"only {printable(', '.join(suffixes))}"
    if len(set(suffixes)) < len(suffixes):
        return Record(key, (), "a member of the same name is in the tar twice")
    if image is None:
        return Record(key, (), f"no image ({', '.join(selection.images)}) in the tar, {there}")
    if caption is None:
        return Record(key, (), f"no caption ({', '.join(selection.captions)}) in the tar, {there}")
    if isinstance(caption.captions, str):
        return Record(key, (), printable(caption.captions))
    return Record(key, caption.captions, None, image.member.offset, image.member.size)


def _count_unused(
    parts: _SampleMembers, record: Record | None, selection: MemberSelection, unused: UnusedFiles
) -> None:
    """Count members that look like images or captions but are in no sample. A damaged sample names its own."""
    if record is not None and record.reason is not None:
        return
    used = [] if record is None else [parts.first(selection.images), parts.first(selection.captions)]
    for _, item in parts.members:
        name = item.member.name
        if any(item is other for other in used):
            continue
        if looks_like_image(name) and (record is None or not selection.is_named[0]):
            is_unread = suffix_of(name) in UNREAD_SUFFIXES
            unused.add(unread_kind(name) if is_unread else SECOND_IMAGE if record else _OTHER, printable(name))
        elif looks_like_caption(name) and (record is None or not selection.is_named[1]):
            unused.add(SECOND_CAPTION if record else NO_IMAGE, printable(name))
