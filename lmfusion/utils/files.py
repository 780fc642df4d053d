"""Writes files and takes locks so that a crash, a full disk, a symbolic link or a second process does no harm.

`atomic_write` is the one place that writes a partial file, flushes it and renames it. It is ours and not a library's,
because it also never follows a symbolic link, notices a second writer, and names the file in every error.
`lmfusion.utils.folders` does the same for whole folders.
"""

import errno
import fcntl
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

LOCKING_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)
"""Error numbers of file systems without locks."""


def full_path(path: str | Path) -> Path:
    """The absolute path, which means the same in every working directory. `~` is the home folder."""
    return Path(path).expanduser().resolve()


@contextmanager
def name_os_errors(path: Path) -> Iterator[None]:
    """Add the name of `path` to system errors without a file name: a full disk, or a disk that fails while reading."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def flush(path: Path) -> None:
    """Force a file, or the entries of a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with name_os_errors(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path, overwrite: bool = True, writer: str | None = None) -> Iterator[BinaryIO]:
    """An open file that takes the place of `path` when the block ends without an error, safe against a power failure.

    Until then the content is in NAME.partial, which is always created: an existing file of that name, such as a
    symbolic link, is never written through. overwrite: whether `path`, and the NAME.partial of a killed process, may be
    replaced. writer: a name that is unique to this thread, for files that several threads may write at the same time.

    Raises FileExistsError where `overwrite` is False and one of the two exists; other OSErrors with a file's name.
    """
    partial = path.with_name(f"{path.name}.partial" if writer is None else f"{path.name}.{writer}.partial")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} must be a regular file or not exist; give another name for the output")
    if overwrite:
        partial.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with name_os_errors(path), open(os.open(partial, flags, 0o666), "wb") as file:
        try:
            # Check after creating the partial file: any other writer fails to create it, so `path` cannot appear now
            if not overwrite and path.exists():
                raise FileExistsError(f"{path} exists already")
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not _is_named(file, partial):
                raise OSError(f"{path} is being written by another process too; start one at a time")
            os.replace(partial, path)
        except BaseException:
            if _is_named(file, partial):
                partial.unlink(missing_ok=True)
            raise
    flush(path.parent)


def _is_named(file: BinaryIO, path: Path) -> bool:
    """Whether `path` is still the open file, and not another one that has taken its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all, even if the power fails."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def check_no_link(folder: Path) -> None:
    """Raise OSError where `folder`, which is about to be written or deleted, is a symbolic link."""
    if folder.is_symlink():
        raise OSError(f"{folder} must not be a symbolic link, since nothing is written through links; delete it")


def new_folder(path: Path) -> None:
    """Make an empty folder; one that a killed process left is deleted first. Raises OSError for a symbolic link."""
    check_no_link(path)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()


def locked_if_exists(folder: Path, rank: int = 0) -> AbstractContextManager[None]:
    """Like `locked`, for reading a folder that another run may be writing. Does nothing if it does not exist."""
    return locked(folder, rank) if folder.is_dir() else nullcontext()


@contextmanager
def locked(folder: Path, rank: int = 0) -> Iterator[None]:
    """Lock `folder` for this run; rank 0 takes the lock for all ranks. The system frees it however the process ends.

    Raises OSError, naming the holder, where another run has locked it, on any machine that shares the file system. On
    file systems without locks, this only prints a warning.
    """
    if rank:
        yield
        return
    path = folder / ".lock"
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o666), "a+", encoding="utf-8") as file:
        with name_os_errors(path):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise OSError(
                    f"{folder} is in use by another process ({holder}); wait for it, or choose another output folder"
                ) from None
            except OSError as error:
                if error.errno not in LOCKING_UNSUPPORTED:
                    raise
                warning = f"{folder} cannot be locked ({error.strerror}): make sure that only one run uses it"
                print(warning, file=sys.stderr)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield
