"""Counts and names the files of a data set that look like images or captions and belong to no sample."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from lmfusion.images.formats import IMAGE_SUFFIXES, UNREAD_SUFFIXES

CAPTION_LIKE_SUFFIXES = ("txt", "caption")
"""Suffixes of files that are probably captions. JSON files are not among them: most hold something else."""
NUM_NAMED = 3

NO_IMAGE = "captions without an image of the same name"
SECOND_IMAGE = "further images of a sample, which has one"
SECOND_CAPTION = "further captions of a sample"


@dataclass
class UnusedKind:
    """The unused files of one kind."""

    kind: str
    """What the files are, in words for the user."""
    count: int
    names: list[str]
    """The first NUM_NAMED of them."""


@runtime_checkable
class FileSource(Protocol):
    """A source that consists of files, and knows which of them it does not use."""

    unused: Sequence[UnusedKind]


class UnusedFiles:
    """Counts unused files by their kind."""

    def __init__(self) -> None:
        self._kinds: dict[str, UnusedKind] = {}

    def add(self, kind: str, name: str) -> None:
        """Count the file `name`."""
        self.merge([UnusedKind(kind, 1, [name])])

    def merge(self, others: Iterable[UnusedKind]) -> None:
        """Add other counts."""
        for other in others:
            mine = self._kinds.setdefault(other.kind, UnusedKind(other.kind, 0, []))
            mine.count += other.count
            mine.names += other.names[: NUM_NAMED - len(mine.names)]

    def list(self) -> list[UnusedKind]:
        """All kinds, in the order of their names."""
        return [self._kinds[kind] for kind in sorted(self._kinds)]


def suffix_of(name: str) -> str:
    """What follows the last dot of a name, in lower case."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def looks_like_image(name: str) -> bool:
    return suffix_of(name) in IMAGE_SUFFIXES + UNREAD_SUFFIXES


def looks_like_caption(name: str) -> bool:
    return suffix_of(name) in CAPTION_LIKE_SUFFIXES


def unread_kind(name: str) -> str:
    """The kind of an image whose format is not read."""
    return f".{suffix_of(name)} files; JPEG, PNG and WEBP are read"


def describe_unused(source: Any, name: str) -> list[str]:
    """Lines that say which files of a source are not used; none if all are used. name: of the source."""
    unused = list(source.unused) if isinstance(source, FileSource) else []
    if not unused:
        return []
    total = sum(of_kind.count for of_kind in unused)
    lines = [f"{name}: files that look like images or captions and are not used: {total:,}"]
    for of_kind in unused:
        more = ", ..." if of_kind.count > len(of_kind.names) else ""
        lines.append(f"{of_kind.count:8,d}  {of_kind.kind}: {', '.join(of_kind.names)}{more}")
    return lines


def report_unused(source: Any, name: str) -> None:
    """Print to stderr which files of a source are not used."""
    for line in describe_unused(source, name):
        print(line, file=sys.stderr)
