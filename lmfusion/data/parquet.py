"""Captioned images in parquet files, as Hugging Face data sets hold them: a column of encoded images, one of captions.

Images are bytes, or structs of which `bytes` is the image; captions are texts, or lists of texts. A file is read in row
groups: its captions and its images apart, so that planning reads no image.
"""

import bisect
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

from PIL import Image

from lmfusion.data.captions import captions_of_value
from lmfusion.data.remote import StorageError, StoredFile, find_files, map_threads, names_of, printable
from lmfusion.data.sources import CaptionedImage
from lmfusion.image.preprocessing import check_file_size, decode_image

IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt")
MAX_GROUP_BYTES = 4 * 1024**3
"""Of a row group's images: a group is read as a whole. Writers make groups of megabytes."""
CACHE_BYTES = 2 * 1024**3
"""Of the images and captions kept, still encoded: with `shuffle_blocks`, some row groups are read in turns."""
NUM_OPENERS = 8
"""Files whose footers are read at the same time."""


class ParquetFiles:
    """The source `parquet`: a parquet file, a glob or brace pattern of them, or an fsspec address of such.

    image, caption: names of columns; None: the first there is of IMAGE_COLUMNS and of CAPTION_COLUMNS. Blocks are row
    groups. Needs the package pyarrow.

    A row without image or caption is a damaged sample, and so is each row of a group that cannot be read; a file
    that is damaged as a whole is one damaged sample. Raises FileNotFoundError where a file is missing, and ValueError
    where a column is, or where there is no row at all.
    """

    def __init__(self, path: str, image: str | None = None, caption: str | None = None) -> None:
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError("parquet files need pyarrow, which is not installed; pip install pyarrow") from None
        self._parquet = pyarrow.parquet
        files = find_files(path, ".parquet")
        names = [printable(name) for name in names_of(files)]
        opened = list(map_threads(self._open, files, NUM_OPENERS))
        whole = [file for file in opened if not isinstance(file, str)]
        if not any(file.metadata.num_rows for file in whole):
            reason = next((reason for reason in opened if isinstance(reason, str)), "its files have no rows")
            raise ValueError(f"there is no sample in {path}: {reason}")
        self._groups: list[_Group | str] = []
        for name, file in zip(names, opened, strict=True):
            if isinstance(file, str):
                self._groups.append(f"{name}: {file}")
            else:
                columns = _columns(name, file.schema, image, caption)
                first = 0
                for number in range(file.metadata.num_row_groups):
                    num_rows = file.metadata.row_group(number).num_rows
                    if num_rows:
                        self._groups.append(_Group(name, file, number, first, num_rows, *columns))
                    first += num_rows
        self.blocks = [1 if isinstance(group, str) else group.num_rows for group in self._groups]
        """Rows of each row group."""
        self._starts = [0, *itertools.accumulate(self.blocks)]
        self._cache = _Cache(CACHE_BYTES)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> CaptionedImage:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        block = bisect.bisect_right(self._starts, index) - 1
        group = self._groups[block]
        if isinstance(group, str):
            raise ValueError(group)
        row = index - self._starts[block]
        sample_id = f"{group.name}/{group.first_row + row}"
        try:
            value = self._column(group, group.caption)[row].as_py()
            if value is None:
                raise ValueError(f"no caption in column {group.caption}")
            captions = captions_of_value(value, group.caption)
        except StorageError:
            raise
        except (ValueError, OSError) as error:
            raise ValueError(f"{sample_id}: {error}") from error
        return CaptionedImage(sample_id, partial(self._load_image, group, row, sample_id), captions)

    def _load_image(self, group: "_Group", row: int, name: str) -> Image.Image:
        value = self._column(group, group.image)[row]
        if group.is_struct and value.is_valid:
            value = value["bytes"]
        if not value.is_valid:
            path = "; it may name a file elsewhere, but holds no image" if group.is_struct else ""
            raise ValueError(f"{name} has no bytes in column {group.image}{path}")
        check_file_size(value.as_buffer().size, name)
        return decode_image(value.as_py(), name)

    def _open(self, file: StoredFile) -> "_File | str":
        """The file's footer, or why it cannot be read."""
        try:
            with file.open() as opened:
                parquet = self._parquet.ParquetFile(opened)
                return _File(file, parquet.metadata, parquet.schema_arrow)
        except (FileNotFoundError, StorageError):
            raise
        except Exception as error:  # pyarrow raises its own and others on damaged files
            return f"the file is no parquet file, or is damaged: {_one_line(error)}"

    def _column(self, group: "_Group", column: str) -> Any:
        """A column of a row group, as pyarrow holds it: image bytes or captions. Raises ValueError or OSError."""
        key = (group.name, group.number, column)
        return self._cache.get(key, lambda: self._read_column(group, column))

    def _read_column(self, group: "_Group", column: str) -> tuple[Any, int]:
        num_bytes = group.num_bytes(column)
        if num_bytes > MAX_GROUP_BYTES:
            raise ValueError(
                f"row group {group.number} of {group.name} holds {num_bytes} bytes of {column}; the limit is "
                f"{MAX_GROUP_BYTES}, write the file with smaller row groups"
            )
        try:
            with group.file.stored.open() as opened:
                parquet = self._parquet.ParquetFile(
                    opened, metadata=group.file.metadata, page_checksum_verification=True
                )
                table = parquet.read_row_group(group.number, columns=[column], use_threads=False)
        except StorageError:
            raise
        except Exception as error:
            raise ValueError(f"row group {group.number} of {group.name} cannot be read: {_one_line(error)}") from error
        if table.num_rows != group.num_rows:
            raise ValueError(f"row group {group.number} of {group.name} has {table.num_rows} rows, not its number")
        return table.column(0), table.nbytes


class _File(NamedTuple):
    stored: StoredFile
    metadata: Any
    schema: Any


class _Group(NamedTuple):
    """A row group."""

    name: str
    file: _File
    number: int
    first_row: int
    """Its number in the file."""
    num_rows: int
    image: str
    caption: str
    is_struct: bool

    def num_bytes(self, column: str) -> int:
        """What a column takes up uncompressed, as the footer tells."""
        group = self.file.metadata.row_group(self.number)
        chunks = [group.column(i) for i in range(group.num_columns)]
        return sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)


class _Cache:
    """Values by key, the most recently used ones up to a number of bytes; each is made by one thread."""

    def __init__(self, num_bytes: int) -> None:
        self._room = num_bytes
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._made: dict[Hashable, Future[Any]] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], tuple[Any, int]]) -> Any:
        """The value at `key`; where there is none, `make` gives it and its size in bytes. Its errors are not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
            future = self._made.get(key)
            if is_maker := future is None:
                future = self._made[key] = Future()
        assert future is not None
        if not is_maker:
            return future.result()
        try:
            value, size = make()
        except BaseException as error:
            with self._lock:
                del self._made[key]
            future.set_exception(error)
            raise
        with self._lock:
            self._values[key] = value, size
            self._room -= size
            while self._room < 0 and len(self._values) > 1:
                self._room += self._values.popitem(last=False)[1][1]
            del self._made[key]
        future.set_result(value)
        return value


def _columns(name: str, schema: Any, image: str | None, caption: str | None) -> tuple[str, str, bool]:
    """(image column, caption column, whether images are structs). Raises ValueError where one is missing or no such."""
    import pyarrow.types as types

    there = schema.names
    found = []
    for chosen, usual, option in ((image, IMAGE_COLUMNS, "image"), (caption, CAPTION_COLUMNS, "caption")):
        column = next((c for c in ((chosen,) if chosen else usual) if c in there), None)
        if column is None:
            raise ValueError(
                f"{name} has no column {chosen or ' or '.join(usual)}; it has {', '.join(there)}: name one as {option}"
            )
        found.append(column)
    kinds = [schema.field(column).type for column in found]
    is_struct = types.is_struct(kinds[0])
    binary = kinds[0]
    if is_struct:
        position = kinds[0].get_field_index("bytes")
        binary = kinds[0].field(position).type if position >= 0 else None
    if binary is None or not (types.is_binary(binary) or types.is_large_binary(binary)):
        raise ValueError(f"column {found[0]} of {name} is {kinds[0]}; images are binary, or structs with binary bytes")
    text = kinds[1].value_type if types.is_list(kinds[1]) or types.is_large_list(kinds[1]) else kinds[1]
    if not (types.is_string(text) or types.is_large_string(text)):
        raise ValueError(f"column {found[1]} of {name} is {kinds[1]}; captions are texts or lists of texts")
    return found[0], found[1], is_struct


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
