"""The source `parquet`: files with a column of encoded images and one of captions, as Hugging Face writes them.

Images are bytes, or structs with a field `bytes`; captions are texts, or lists of texts. Each may be of any Arrow type
that holds such values (large, fixed-size, view and dictionary types too). Files are read by row groups, captions and
images separately, so that planning reads no image.
"""

from functools import partial
from typing import Any, NamedTuple

from PIL import Image

from lmfusion.data.samples import CaptionedImage
from lmfusion.data.sources.base import Blocks
from lmfusion.data.sources.captions import captions_of_value
from lmfusion.data.storage.files import StorageError, StoredFile, find_files, names_of
from lmfusion.images.preprocessing import check_file_size, decode_image
from lmfusion.utils.byte_cache import ByteCache
from lmfusion.utils.prefetch import map_threads
from lmfusion.utils.printing import printable

IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt")
MAX_GROUP_BYTES = 4 * 1024**3
"""Of one column of a row group, decoded. A row group is kept as a whole; writers make them some megabytes large."""
BATCH_ROWS = 4
"""Rows decoded at a time. The size of a column is unknown until it is decoded, since a value that a file stores once
may be in every row. An array of a few rows also stays below the 2 GiB that some Arrow types can hold."""
MAX_DICTIONARY_ROWS = 2**24
"""Rows of a dictionary column decoded at a time: every batch holds the whole dictionary, so batches must be large."""
CACHE_BYTES = 2 * 1024**3
"""Of images (still encoded) and captions kept in memory: with `shuffle_blocks`, a few row groups are read in turns."""
NUM_OPENERS = 8
"""Files whose footers are read at the same time."""


class ParquetFiles(Blocks):
    """The source `parquet`: a parquet file, a glob or brace pattern of them, or an fsspec address of such.

    image, caption: names of columns; None: the first of IMAGE_COLUMNS and of CAPTION_COLUMNS that exists. Blocks are
    row groups. Needs the package pyarrow.

    A row without image or caption is a damaged sample, and so is each row of a group that cannot be read. A file that
    is damaged as a whole is one damaged sample. Raises FileNotFoundError where a file is missing, and ValueError where
    a column is missing, or where there are no rows.
    """

    def __init__(self, path: str, image: str | None = None, caption: str | None = None) -> None:
        try:
            import pyarrow.compute
            import pyarrow.parquet
        except ImportError:
            raise ValueError("parquet files need pyarrow, which is not installed; pip install pyarrow") from None
        self._parquet = pyarrow.parquet
        self._chunked_array = pyarrow.chunked_array
        self._struct_field = pyarrow.compute.struct_field
        files = find_files(path, ".parquet")
        names = [printable(name) for name in names_of(files)]
        opened = list(map_threads(self._open, files, NUM_OPENERS))
        whole = [file for file in opened if not isinstance(file, str)]
        if not any(file.metadata.num_rows for file in whole):
            reason = next((reason for reason in opened if isinstance(reason, str)), "its files have no rows")
            raise ValueError(f"{path} must have samples, but has none: {reason}")
        self._groups: list[_Group | str] = []
        for name, file in zip(names, opened, strict=True):
            if isinstance(file, str):
                self._groups.append(f"{name}: {file}")
            else:
                columns = _columns(name, file.schema, image, caption)
                first = 0
                for number in range(file.metadata.num_row_groups):
                    num_rows = file.metadata.row_group(number).num_rows
                    if num_rows > 0:
                        self._groups.append(_Group(name, file, number, first, num_rows, *columns))
                    first += num_rows
        self.set_blocks([1 if isinstance(group, str) else group.num_rows for group in self._groups])
        self._cache: ByteCache[Any] = ByteCache(CACHE_BYTES)

    def __getitem__(self, index: int) -> CaptionedImage:
        block, row = self.locate(index)
        group = self._groups[block]
        if isinstance(group, str):
            raise ValueError(group)
        sample_id = f"{group.name}/{group.first_row + row}"
        try:
            value = self._column(group, group.caption)[row].as_py()
            if value is None:
                raise ValueError(f"column {group.caption} must have a caption, got null")
            captions = captions_of_value(value, group.caption)
        except StorageError:
            raise
        except (ValueError, OSError) as error:
            raise ValueError(f"{sample_id}: {error}") from error
        return CaptionedImage(sample_id, partial(self._load_image, group, row, sample_id), captions)

    def _load_image(self, group: "_Group", row: int, name: str) -> Image.Image:
        value = self._column(group, group.image)[row]
        if group.is_dictionary(group.image):
            value = value.value
        if not value.is_valid:
            hint = "; a path to a file elsewhere is not read" if group.is_struct else ""
            raise ValueError(f"{name} must have bytes in column {group.image}, got null{hint}")
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
            return f"the file must be a whole parquet file: {_one_line(error)}"

    def _column(self, group: "_Group", column: str) -> Any:
        """A column of a row group: a pyarrow.ChunkedArray of image bytes or captions. Raises ValueError or OSError."""
        key = (group.name, group.number, column)
        values = self._cache.get(key, lambda: self._read_column(group, column))
        if values is None:
            raise ValueError(
                f"column {column} of row group {group.number} of {group.name} must have at most {MAX_GROUP_BYTES} "
                "bytes; write the file with smaller row groups"
            )
        return values

    def _read_column(self, group: "_Group", column: str) -> tuple[Any, int]:
        """The column and its size in bytes; (None, 0), which is kept too, if it is larger than MAX_GROUP_BYTES."""
        num_rows = min(group.num_rows, MAX_DICTIONARY_ROWS) if group.is_dictionary(column) else BATCH_ROWS
        chunks: list[Any] = []
        num_bytes = 0
        try:
            with group.file.stored.open() as opened:
                # With pre_buffer, its default, Arrow reads in a global pool of threads. Such a thread may still be
                # running when the process ends, and then std::terminate aborts it, whatever has been closed before.
                parquet = self._parquet.ParquetFile(
                    opened, metadata=group.file.metadata, pre_buffer=False, page_checksum_verification=True
                )
                for batch in parquet.iter_batches(num_rows, [group.number], [column], use_threads=False):
                    values = batch.column(batch.schema.get_field_index(column))
                    if column == group.image and group.is_struct:
                        values = self._struct_field(values, "bytes")
                    values.validate(
                        full=group.is_dictionary(column)
                    )  # in a damaged file, references may be out of range
                    num_bytes += values.nbytes
                    if num_bytes > MAX_GROUP_BYTES:
                        return None, 0
                    chunks.append(values)
        except StorageError:
            raise
        except Exception as error:
            raise ValueError(f"row group {group.number} of {group.name} cannot be read: {_one_line(error)}") from error
        if sum(map(len, chunks)) != group.num_rows:
            raise ValueError(
                f"row group {group.number} of {group.name} must have {group.num_rows} rows, got {sum(map(len, chunks))}"
            )
        return self._chunked_array(chunks), num_bytes


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
    """Whether images are structs with their bytes."""
    dictionaries: frozenset[str]
    """Which of the two columns store each value once and refer to it."""

    def is_dictionary(self, column: str) -> bool:
        return column in self.dictionaries


def _columns(name: str, schema: Any, image: str | None, caption: str | None) -> tuple[str, str, bool, frozenset[str]]:
    """(image column, caption column, whether images are structs, which columns are dictionaries).

    Raises ValueError where a column is missing, or its type holds no images or captions.
    """
    import pyarrow.types as types

    there = schema.names
    found = []
    for chosen, usual, option in ((image, IMAGE_COLUMNS, "image"), (caption, CAPTION_COLUMNS, "caption")):
        column = next((c for c in ((chosen,) if chosen else usual) if c in there), None)
        if column is None:
            raise ValueError(
                f"{name} must have a column {chosen or ' or '.join(usual)}, got {', '.join(there)}; name one as "
                f"{option}"
            )
        found.append(column)
    for column in found:
        if there.count(column) > 1:
            raise ValueError(f"{name} must have one column {column}, got {there.count(column)}; name another column")
    kinds = [schema.field(column).type for column in found]
    images, captions = kinds
    is_struct = types.is_struct(images)
    if is_struct:
        position = images.get_field_index("bytes")
        images = images.field(position).type if position >= 0 else None
    if _is_list(captions):
        captions = captions.value_type
    dictionaries = frozenset(
        column for column, kind in zip(found, (images, captions), strict=True) if kind and types.is_dictionary(kind)
    )
    if not _is_binary(images):
        raise ValueError(f"column {found[0]} of {name} must be binary, or structs with binary bytes, got {kinds[0]}")
    if not _is_text(captions):
        raise ValueError(f"column {found[1]} of {name} must be texts or lists of texts, got {kinds[1]}")
    return found[0], found[1], is_struct, dictionaries


def _is_binary(kind: Any) -> bool:
    import pyarrow.types as types

    if kind is not None and types.is_dictionary(kind):
        kind = kind.value_type
    tests = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return kind is not None and any(test(kind) for test in tests)


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return any(test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view))


def _is_list(kind: Any) -> bool:
    import pyarrow.types as types

    tests = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(test(kind) for test in tests)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
