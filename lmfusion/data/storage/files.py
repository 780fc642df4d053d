"""Lists the files of a data set and reads ranges of their bytes: local paths and fsspec addresses in one interface.

    photos.tar, photos/*.tar, photos-{0000..0099}.tar, s3://bucket/photos-{0000..0099}.tar, memory://photos.tar

Local files are read with the operating system's calls and not with fsspec, which is optional: os.pread reads a range
without a file position, so threads can share a file; a file that is gone, not permitted or on a failing disk can be
told apart by its errno; and the version of a file has nanoseconds. Addresses with a protocol need the package fsspec,
and mostly that of the protocol (s3fs, gcsfs, ...).
"""

import errno
import glob
import hashlib
import io
import itertools
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from lmfusion.images.preprocessing import check_file_size, decode_image
from lmfusion.utils.prefetch import map_threads
from lmfusion.utils.printing import printable

T = TypeVar("T")

NUM_TRIES = 3
"""Tries of one read, local or remote: storage that fails for a moment is not damage."""
RETRY_SECONDS = 0.5
"""Wait before the second try; before each further one it is four times as long."""
NUM_STATS = 16
"""Threads that look up files when a source is opened. They wait for the network or the disk, not the processor."""
MAX_FILES = 1_000_000
"""Of one pattern: a typing error in a brace must not fill the memory."""

_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)
"""Errors of a local file system for a name without a file. Trying again would not help."""
_BRACE = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_VERSIONS = ("etag", "ETag", "md5Hash", "generation", "mtime", "LastModified", "last_modified", "updated", "created")
"""Names under which storages give what changes when a file does; the first that exists is used."""


class StorageError(OSError):
    """A file that exists but could not be read in NUM_TRIES tries.

    This is not damage: if such a sample were skipped and a later try succeeded, a run would see other data than before.
    So the run must stop.
    """


@dataclass(frozen=True)
class StoredFile:
    """A file at a local path or an fsspec address. Threads may read it at the same time."""

    address: str
    size: int
    """bytes"""
    version: str
    """Changes when the file does: its modification time or etag, as far as the storage gives one."""
    _filesystem: Any = field(default=None, repr=False, compare=False)
    _path: str = ""
    """The path in the file system."""

    @property
    def is_local(self) -> bool:
        return self._filesystem is None

    def read(self, start: int, length: int) -> bytes:
        """Exactly the bytes [start, start + length), with up to NUM_TRIES tries.

        Raises StorageError where reading fails, and where the file is gone or has become shorter; ValueError where it
        never was that long.
        """
        if start + length > self.size:
            raise ValueError(f"{self.address} is truncated: it has {self.size} bytes, but must have {start + length}")
        try:
            if self._filesystem is None:
                data = retry(lambda: _read_local(self.address, start, length), self.address)
            else:
                cat = self._filesystem.cat_file
                data = retry(lambda: cat(self._path, start=start, end=start + length), self.address)
        except FileNotFoundError as error:
            raise StorageError(f"{self.address} is gone; it was there when it was opened") from error
        if len(data) != length:
            raise StorageError(
                f"{self.address} must not become shorter while it is read; run the same command again, once it is whole"
            )
        return data

    def open(self) -> io.RawIOBase:
        """An unbuffered binary file object. It reads with `read`, so every range is retried, and must be whole."""
        return _OpenedFile(self)


class _OpenedFile(io.RawIOBase):
    def __init__(self, file: StoredFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._file.size - self._position))
        buffer[:length] = self._file.read(self._position, length) if length else b""
        self._position += length
        return length


def find_files(pattern: str, suffix: str) -> list[StoredFile]:
    """The files of a path, glob or brace pattern: braces in their order, globs sorted.

    suffix: of such files, for the examples in errors. Raises ValueError for a pattern that finds no
    file, finds one twice or finds a folder; FileNotFoundError, naming the first of them, for files that are missing.
    """
    addresses: list[_Address] = []
    for expanded in expand_braces(pattern):
        addresses += _find(expanded)
    if not addresses:
        raise ValueError(f"{pattern} must match a file; give a path, a glob like photos/*{suffix} or an address")
    seen: set[str] = set()
    for address, *_ in addresses:
        if address in seen:
            raise ValueError(f"{pattern} must match each file once, but matches {address} twice")
        seen.add(address)
    files, missing = [], []
    for (address, *_), file in zip(addresses, map_threads(_stat, addresses, NUM_STATS), strict=True):
        if file is None:
            missing.append(address)
        else:
            files.append(file)
    if missing == [pattern]:
        raise FileNotFoundError(f"there is no file {pattern}")
    if missing:
        named = ", ".join([*missing[:3], "..."] if len(missing) > 3 else missing)
        raise FileNotFoundError(f"{len(missing)} of the {len(addresses)} files of {pattern} are missing: {named}")
    return files


def join(folder: str, name: str) -> str:
    """The address of the file `name`, a relative path with slashes, in a folder's address."""
    return f"{folder.rstrip('/')}/{name}" if folder else name


def parent(address: str) -> str:
    """The folder of a file's address; "" for the current one."""
    return address.rpartition("/")[0] if "://" in address else os.path.dirname(address)


def stored_file(address: str) -> StoredFile:
    """The file at a path or address, without patterns. Raises FileNotFoundError, or ValueError for a folder."""
    found = _stat((address, *_filesystem(address)))
    if found is None:
        raise FileNotFoundError(f"there is no file {address}")
    return found


def read_file(path: str | os.PathLike[str], check_size: Callable[[int], None]) -> bytes:
    """A local file as a whole, with up to NUM_TRIES tries. check_size: raises ValueError for a size that is too large.

    Raises ValueError where it is not a regular file, FileNotFoundError or a similar OSError where there is none,
    StorageError where it cannot be read.
    """
    return retry(lambda: _read_regular(path, check_size), os.fspath(path))


def load_image_file(path: str | os.PathLike[str]) -> Image.Image:
    """The image in a local file of a data set, as `decode_image` returns it. Raises what it and `read_file` raise."""
    name = printable(os.fspath(path))
    return decode_image(read_file(path, partial(check_file_size, name=name)), name)


def retry(read: Callable[[], T], address: str) -> T:
    """The result of `read`, which is tried again where storage fails.

    Raises StorageError, naming the address, where the last try fails, or where reading is not permitted. Errors about
    the file itself (it does not exist, or its contents are wrong) are raised as they are.
    """
    failures = Exception if "://" in address else OSError  # storage packages raise exceptions of their own
    wait = RETRY_SECONDS
    for number in range(1, NUM_TRIES + 1):
        try:
            return read()
        except failures as error:
            if isinstance(error, FileNotFoundError) or getattr(error, "errno", None) in _NO_SUCH_FILE:
                raise
            if number == NUM_TRIES or isinstance(error, PermissionError):
                what = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                raise StorageError(f"cannot read {printable(address)}: {printable(what)}") from error
        time.sleep(wait)
        wait *= 4
    raise AssertionError("the last try returns or raises")


def names_of(files: Iterable[StoredFile]) -> list[str]:
    """A short name for every file: its path in the deepest folder that contains them all."""
    paths = [file.address.split("/") for file in files]
    folders = [path[:-1] for path in paths]
    depth = 0
    for level in zip(*folders, strict=False):
        if len(set(level)) > 1:
            break
        depth += 1
    return ["/".join(path[depth:]) for path in paths]


def is_inside(name: str) -> bool:
    """Whether a relative path from a data set stays in its folder. Paths that lead out are never opened."""
    parts = re.split(r"[/\\]", name)
    return bool(name) and "\0" not in name and "://" not in name and parts[0] != "" and ".." not in parts


def cache_folder() -> Path:
    """The folder for indexes that cannot be written beside their files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lmfusion")


def cached_name(address: str, suffix: str) -> Path:
    """The path in the cache folder that belongs to an address."""
    digest = hashlib.blake2b(address.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return cache_folder() / f"{digest}{suffix}"


def expand_braces(pattern: str) -> Iterator[str]:
    """`a-{000..002}-{x,y}` -> a-000-x, a-000-y, a-001-x, ... A range keeps its leading zeros.

    Raises ValueError for a range that runs backwards and for more than MAX_FILES.
    """
    parts = _BRACE.split(pattern)
    choices = [[part] if i % 2 == 0 else _choices(part, pattern) for i, part in enumerate(parts)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MAX_FILES:
        raise ValueError(f"{pattern} must expand to at most {MAX_FILES} files, got {count}")
    return ("".join(chosen) for chosen in itertools.product(*choices))


def _choices(text: str, pattern: str) -> list[str]:
    if match := _RANGE.fullmatch(text):
        first, last = match.groups()
        if int(first) > int(last):
            raise ValueError(f"{{{text}}} in {pattern} must have the lower number first")
        if int(last) - int(first) >= MAX_FILES:
            raise ValueError(f"{{{text}}} in {pattern} must expand to at most {MAX_FILES} files")
        return [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return text.split(",")


_Address = tuple[str, Any, str]
"""The address, its fsspec file system (None: local), and the path there."""


def _find(address: str) -> list[_Address]:
    """The files of an address, which may be a glob."""
    filesystem, path = _filesystem(address)
    if not any(character in path for character in "*?[") or (filesystem is None and os.path.exists(path)):
        return [(address, filesystem, path)]
    if filesystem is None:
        return [(found, None, found) for found in sorted(glob.glob(path, recursive=True))]
    with _storage_errors(address):
        return [(filesystem.unstrip_protocol(found), filesystem, found) for found in sorted(filesystem.glob(path))]


def _filesystem(address: str) -> tuple[Any, str]:
    """The file system of an address (None: local) and the path there."""
    if "://" not in address:
        return None, address
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ValueError(f"{address} needs fsspec, which is not installed; pip install fsspec") from None
    try:
        filesystem, path = url_to_fs(address)
    except (ValueError, ImportError) as error:  # unknown protocol, or its package is missing
        raise ValueError(f"cannot read {address}: {error}") from error
    return filesystem, path


def _stat(where: _Address) -> StoredFile | None:
    address, filesystem, path = where
    if filesystem is None:
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{address} must be a regular file; name the files in a folder, such as {address}/*")
        return StoredFile(address, status.st_size, str(status.st_mtime_ns))
    try:
        info = retry(lambda: filesystem.info(path), address)
    except FileNotFoundError:
        return None
    if info.get("type") == "directory":
        raise ValueError(f"{address} must be a file, but is a folder; name the files in it, such as {address}/*")
    if info.get("size") is None:
        raise ValueError(f"the storage must give the size of {address}, since it is read by ranges; it gives none")
    version = next((str(info[key]) for key in _VERSIONS if info.get(key) is not None), "")
    return StoredFile(address, int(info["size"]), version, filesystem, path)


def _read_local(path: str, start: int, length: int) -> bytes:
    """Up to `length` bytes of a local file; fewer only at its end."""
    with open(path, "rb", buffering=0) as file:
        parts = []
        while length > 0 and (part := os.pread(file.fileno(), length, start)):  # one call may return less than there is
            parts.append(part)
            start, length = start + len(part), length - len(part)
    return b"".join(parts)


def _read_regular(path: str | os.PathLike[str], check_size: Callable[[int], None]) -> bytes:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
        raise ValueError(f"{printable(os.fspath(path))} must be a regular file; leave it out")
    check_size(status.st_size)
    return _read_local(os.fspath(path), 0, status.st_size)


@contextmanager
def _storage_errors(address: str) -> Iterator[None]:
    """Turn any exception of a storage's package into an OSError that names the address."""
    try:
        yield
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:
        raise OSError(f"cannot read {address}: {type(error).__name__}: {error}") from error
