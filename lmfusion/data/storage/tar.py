"""Reads the headers of a tar: names, offsets and sizes of its files, without extracting any.

The reader is our own, and not the standard library's tarfile, for three reasons: tarfile stops silently at some damaged
headers, where the rest of the samples would be missing without an error; it reads header by header, where a remote tar
needs ranges of 8 MiB; and it follows sizes in pax headers without a limit. It reads what GNU tar, BSD tar, Python and
webdataset write: ustar, GNU and pax headers. A name is only a label, whatever path it contains.
"""

from collections.abc import Iterator
from typing import NamedTuple

from lmfusion.data.storage.files import StoredFile

BLOCK = 512
MAX_HEADER_BYTES = 64 * 1024
"""Of a long name or pax header. A path has at most 4 KiB; a larger size is damage, and must not fill the memory."""
LOCAL_WINDOW = 4096
"""Bytes read at a time while going through the headers of a local tar, whose data is skipped."""
REMOTE_WINDOW = 8 * 1024 * 1024
"""The same for a remote tar. It is read from end to end: a request for every header would take longer."""

_FOLDER = b"5"
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, folders and pipes: no data follows their header, whatever size it has."""


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int
    """bytes from the start of the tar"""
    size: int
    """bytes"""


class DamagedTarError(ValueError):
    """A tar with a damaged part. The members before it are good."""


class TarReader:
    """The files of a tar, in order, and their contents. For one thread."""

    def __init__(self, file: StoredFile) -> None:
        self._file = file
        self._window_size = LOCAL_WINDOW if file.is_local else REMOTE_WINDOW
        self._window = b""
        self._start = 0
        self.skipped_members: list[str] = []
        """Names of members that are neither regular files nor folders: links, and sparse files."""

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the tar; cheap near the last ones read. Raises OSError, and DamagedTarError beyond the end."""
        if offset + size > self._file.size:
            raise DamagedTarError(f"ends at byte {self._file.size}, inside a member; it is cut off")
        if not (self._start <= offset and offset + size <= self._start + len(self._window)):
            self._start = offset
            self._window = self._file.read(offset, min(max(size, self._window_size), self._file.size - offset))
        return self._window[offset - self._start : offset - self._start + size]

    def members(self) -> Iterator[Member]:
        """Every regular file, in order, without one in which the tar is cut off.

        Raises OSError, and DamagedTarError where the tar is damaged or cut off, or the file is not a tar.
        """
        offset, long_name, pax = 0, None, {}  # type: int, bytes | None, dict[str, bytes]
        if self._file.size and self._file.read(0, min(2, self._file.size)) == b"\x1f\x8b":
            raise DamagedTarError("is compressed, but its members must be readable one by one; gunzip it")
        while True:
            if self._file.size < offset + BLOCK:
                raise DamagedTarError(f"ends at byte {self._file.size} without an end mark; it is empty or cut off")
            header = self.read(offset, BLOCK)
            if not any(header):
                return
            _check_sum(header, offset)
            kind = header[156:157]
            size = _number(pax["size"] if "size" in pax else header[124:136], "size" in pax, offset)
            size = 0 if kind in _WITHOUT_DATA else size
            data = offset + BLOCK
            offset = data + -(-size // BLOCK) * BLOCK
            if kind in (b"L", b"K", b"x", b"g", b"X"):  # describes the member that follows
                if size > MAX_HEADER_BYTES:
                    raise DamagedTarError(f"has a header of {size} bytes at byte {data}, more than {MAX_HEADER_BYTES}")
                content = self.read(data, size)
                if kind == b"L":
                    long_name = content.rstrip(b"\0")
                    if b"\0" in long_name:
                        raise DamagedTarError(f"has a damaged long name at byte {data}")
                elif kind in (b"x", b"X"):
                    pax = _pax(content, data)
                continue
            if data + size > self._file.size:
                raise DamagedTarError(f"ends at byte {self._file.size}, inside a member; it is cut off")
            name = (pax.get("path") or long_name or _ustar_name(header)).decode("utf-8", "replace")
            if kind in _REGULAR and "GNU.sparse.major" not in pax:
                if not name.endswith("/"):  # folders of the oldest tars
                    yield Member(name, data, size)
            elif kind != _FOLDER:
                self.skipped_members.append(pax.get("GNU.sparse.name", name.encode()).decode("utf-8", "replace"))
            long_name, pax = None, {}


def _check_sum(header: bytes, offset: int) -> None:
    try:
        expected = int(header[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        expected = -1
    if sum(header) - sum(header[148:156]) + 8 * 0x20 != expected:
        raise DamagedTarError("is not a tar" if offset == 0 else f"has a damaged header at byte {offset}")


def _number(digits: bytes, is_decimal: bool, offset: int) -> int:
    """A size: octal; decimal in a pax header; or binary if its first bit is set (GNU)."""
    try:
        if is_decimal:
            number = int(digits)
        elif digits[0] & 0x80:
            number = int.from_bytes(bytes([digits[0] & 0x7F]) + digits[1:], "big")
        else:
            number = int(digits.strip(b" \0") or b"0", 8)
    except ValueError:
        number = -1
    if number < 0:
        raise DamagedTarError(f"has a damaged size at byte {offset}")
    return number


def _ustar_name(header: bytes) -> bytes:
    name, prefix = (field.split(b"\0")[0] for field in (header[:100], header[345:500]))
    is_posix = header[257:263] == b"ustar\0"  # GNU has times where POSIX has the prefix
    return prefix + b"/" + name if prefix and is_posix else name


def _pax(content: bytes, offset: int) -> dict[str, bytes]:
    """The records `length key=value\\n` of a pax header."""
    records: dict[str, bytes] = {}
    while content.strip(b"\0"):
        length, separator, _ = content.partition(b" ")
        is_number = length.isdigit() and len(length) <= len(
            str(MAX_HEADER_BYTES)
        )  # Python refuses to convert very long numbers
        if not separator or not is_number or not len(length) < int(length) <= len(content):
            raise DamagedTarError(f"has a damaged pax header at byte {offset}")
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value
        content = content[int(length) :]
    return records
