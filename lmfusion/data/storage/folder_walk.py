"""Lists the files in a folder and its subfolders. Follows links to folders, and reads each folder once."""

import os
import stat
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lmfusion.data.storage.files import StorageError, retry


class FoundFile(NamedTuple):
    """A file, or anything else except a folder."""

    name: str
    """Path in the folder, with slashes."""
    is_there: bool
    """False for a link without a target."""


class _Link(NamedTuple):
    name: str
    identity: tuple[int, int]


def find_all(folder: Path) -> list[FoundFile]:
    """All files in a folder and its subfolders in order of path, without hidden files and those in `__MACOSX`.

    A link to a folder is followed, unless that folder lies inside `folder`, and so is read anyway, or contains it,
    which would be a cycle. Raises StorageError where a folder cannot be read: its files would silently be missing.
    """
    seen = {_identity(os.stat(place)) for place in (folder.resolve(), *folder.resolve().parents)}
    found, links = _walk(folder, "", seen)
    while links:
        links.sort(reverse=True)
        link = links.pop()
        if link.identity not in seen:
            seen.add(link.identity)
            more, further = _walk(folder, link.name, seen)
            found += more
            links += further
    return sorted(found)


def _walk(folder: Path, start: str, seen: set[tuple[int, int]]) -> tuple[list[FoundFile], list[_Link]]:
    """Files below `start`, and the links to folders there. The folders are added to `seen`."""
    found: list[FoundFile] = []
    links: list[_Link] = []
    places = [start]
    while places:
        place = places.pop()
        for entry in retry(partial(_entries, folder / place), os.fspath(folder / place)):
            name = f"{place}/{entry.name}" if place else entry.name
            is_link = entry.is_symlink()
            status = _status(entry) if is_link or entry.is_dir() else None
            if status is None or not stat.S_ISDIR(status.st_mode):
                if not entry.name.startswith("."):
                    found.append(FoundFile(name, status is not None or not is_link))
            elif entry.name == "__MACOSX":
                continue
            elif is_link:
                links.append(_Link(name, _identity(status)))
            elif _identity(status) not in seen:
                seen.add(_identity(status))
                places.append(name)
    return found, links


def _entries(place: Path) -> list[os.DirEntry[str]]:
    with os.scandir(place) as entries:
        return list(entries)


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """The status of a folder or of the target of a link. None for a link without a target, or to itself."""
    try:
        return retry(lambda: os.stat(entry.path), entry.path)
    except StorageError:
        raise
    except OSError:
        return None


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
