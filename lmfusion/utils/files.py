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
"""What file systems that know no locks answer."""


def full_path(path: str | Path) -> Path:
    """`path` from the root, so that it means the same in every working directory. `~` is the home folder."""
    return Path(path).expanduser().resolve()


@contextmanager
def name_os_errors(path: Path) -> Iterator[None]:
    """Give system errors that name no file the name of `path`: a full disk, or a disk that fails while it is read."""
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
    """An open file whose content becomes that of `path` when the block ends without an error, also if the power fails.

    Until then it lies in NAME.partial, which is always made anew: what somebody else put there, a symbolic link say, is
    never written through. overwrite: whether `path`, and the NAME.partial of a killed process, may be replaced. writer:
    a name of this thread's own, for files that several may write at the same time.

    Raises FileExistsError where `overwrite` is False and either is there; other OSErrors with the name of a file.
    """
    partial = path.with_name(f"{path.name}.partial" if writer is None else f"{path.name}.{writer}.partial")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file; give another name for the output")
    if overwrite:
        partial.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with name_os_errors(path), open(os.open(partial, flags, 0o666), "wb") as file:
        try:
            # Only the process that made the partial file checks if the name is free, so nobody can take it meanwhile
            if not overwrite and path.exists():
                raise FileExistsError(f"{path} is there already")
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
    """Whether `path` is the open file, and no other that has taken its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all, also where the power fails."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def check_no_link(folder: Path) -> None:
    """Raise OSError where `folder`, which is to be written or deleted, is a symbolic link into some other folder."""
    if folder.is_symlink():
        raise OSError(f"{folder} is a symbolic link, and nothing is written through it; delete the link")


def new_folder(path: Path) -> None:
    """Make an empty folder; one that a killed process left there is deleted. Raises OSError for a symbolic link."""
    check_no_link(path)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()


def locked_if_exists(folder: Path, rank: int = 0) -> AbstractContextManager[None]:
    """Like `locked`, for reading what another run may be writing. Does nothing where the folder does not exist."""
    return locked(folder, rank) if folder.is_dir() else nullcontext()


@contextmanager
def locked(folder: Path, rank: int = 0) -> Iterator[None]:
    """Hold `folder` for this run; rank 0 takes the lock for all ranks. The system frees it however the process ends.

    Raises OSError, naming the holder, where another run holds it, on any machine that shares the file system. Some
    file systems know no locks; there a warning is all.
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
                    f"another process is at work in {folder} ({holder}); wait for it, or set output elsewhere"
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
