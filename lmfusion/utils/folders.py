"""Replaces a folder as a whole: the new one is written beside it, flushed to the disk, and renamed last.

A kill leaves one of these states, and each is repaired by the next `replace_folder` of the same path:

    .NAME.saving-PID    an incomplete new folder; deleted once no process has locked it
    .NAME.previous      the old folder: alone between the two renames, then beside the new one until its files are moved
"""

import fcntl
import glob
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lmfusion.utils.files import flush, new_folder


def current_folder(path: Path) -> Path:
    """The folder with the content of `path`: the old one's temporary name if a process died between the renames.

    `path` itself if neither exists.
    """
    previous = _previous(path)
    return previous if previous.is_dir() and not path.exists() else path


def replace_folder(path: Path, write: Callable[[Path], None], is_stale: Callable[[str], bool]) -> None:
    """Let `write` fill an empty folder, which then takes the place of `path`.

    is_stale: whether a file of the old folder, given its name, is deleted with it. Other files that the new folder
    lacks are moved into it.

    The old folder is untouched until the new one is complete. Raises OSError when writing fails, and what `write`
    raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete_abandoned(path)
    new = path.with_name(f".{path.name}.saving-{os.getpid()}")
    new_folder(new)
    try:
        with _locked_while_written(new):
            write(new)
            for file in (*new.rglob("*"), new):
                flush(file)
            _swap(new, path, is_stale)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _swap(new: Path, path: Path, is_stale: Callable[[str], bool]) -> None:
    previous = _previous(path)
    if path.exists():
        _finish(path, is_stale)  # finish an earlier swap that was interrupted
        os.rename(path, previous)
        try:
            os.rename(new, path)
        except OSError:
            os.rename(previous, path)
            raise
    else:
        os.rename(new, path)
    flush(path.parent)
    _finish(path, is_stale)


def _finish(path: Path, is_stale: Callable[[str], bool]) -> None:
    """Move the files to keep from the old folder into the new one, and delete the old folder."""
    previous = _previous(path)
    if not previous.exists():
        return
    for file in previous.iterdir():
        if not is_stale(file.name) and not (path / file.name).exists():
            os.rename(file, path / file.name)
    shutil.rmtree(previous)


@contextmanager
def _locked_while_written(folder: Path) -> Iterator[None]:
    """Lock a folder while it is being written, so that other processes do not take it for abandoned."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # on file systems without locks, abandoned folders are not deleted either
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _delete_abandoned(path: Path) -> None:
    """Delete unfinished new folders for `path` whose processes have ended."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.saving-*"):
        try:
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # not a folder
            continue
        try:
            with suppress(OSError):  # in use, or a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(descriptor)
