"""How are files written so that a crash, a full disk or a second process does no harm?"""

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)
"""What file systems that know no locks answer."""


def flush(path: Path) -> None:
    """Force a file, or the entries of a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all, also where the power fails."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    os.replace(partial, path)
    flush(path.parent)


@contextmanager
def locked(folder: Path, rank: int = 0) -> Iterator[None]:
    """Hold `folder` for this run; rank 0 takes the lock for all ranks. The system frees it however the process ends.

    Raises OSError, naming the holder, where another run holds it, on any machine that shares the file system. Some
    file systems know no locks; there a warning is all.
    """
    if rank:
        yield
        return
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise OSError(
                f"another process is at work in {folder} ({holder}); wait for it, or set output elsewhere"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"{folder} cannot be locked ({error.strerror}): see to it that one run uses it", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
