"""Replaces a folder as a whole: the new one is written beside it, flushed to the disk, and renamed last.

A kill leaves one of these states, and each is repaired by the next `replace_folder` of the same path:

    .NAME.saving-PID    a successor that is not complete; deleted once nobody holds it
    .NAME.previous      the old folder: alone between the two renames, beside the new one before files are moved over
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
    """Where the content of `path` lies: there, or where the old folder waits if the process died between the renames.

    Answers with `path` where there is neither.
    """
    previous = _previous(path)
    return previous if previous.is_dir() and not path.exists() else path


def replace_folder(path: Path, write: Callable[[Path], None], is_stale: Callable[[str], bool]) -> None:
    """Let `write` fill an empty folder, which then takes the place of `path`.

    is_stale: whether a file of the old folder, by its name, goes with it. Others that have no successor are kept.

    What was there before is untouched until the new folder is complete. Raises OSError when writing fails, and what
    `write` raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete_abandoned(path)
    new = path.with_name(f".{path.name}.saving-{os.getpid()}")
    new_folder(new)
    try:
        with _held(new):
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
        _finish(path, is_stale)  # an earlier swap that was interrupted
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
    """Move what is to be kept of the old folder into the new one, and delete the old folder."""
    previous = _previous(path)
    if not previous.exists():
        return
    for file in previous.iterdir():
        if not is_stale(file.name) and not (path / file.name).exists():
            os.rename(file, path / file.name)
    shutil.rmtree(previous)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a folder while it is being written, so that no other process takes it for abandoned."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some file systems cannot; there abandoned folders are not found either
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _delete_abandoned(path: Path) -> None:
    """Delete unfinished successors of `path` whose processes are gone."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.saving-*"):
        try:
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # no folder
            continue
        try:
            with suppress(OSError):  # held, or a file system without such locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(descriptor)
