"""Documents of texts and images in their order: lines of JSON that name image files beside them.

{"id": "page 7", "content": ["A cat:", {"image": "cats/1.jpg"}, "And a dog:", {"image": "dogs/4.png"}]}
"""

import bisect
import itertools
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from lmfusion.data.captions import MAX_LINE_BYTES, checked_text, parse_json
from lmfusion.data.remote import (
    StoredFile,
    find_files,
    is_inside,
    join,
    map_threads,
    names_of,
    parent,
    printable,
    stored_file,
)
from lmfusion.data.sources import Interleaved, LoadImage
from lmfusion.image.preprocessing import check_file_size, decode_image, load_image

NUM_INDEXERS = 8
"""Files whose lines are found at the same time."""
READ_BYTES = 8 * 1024 * 1024
"""Read at once while finding the lines."""


class InterleavedFiles:
    """The source `interleaved`: a jsonl file, a glob or brace pattern of them, or an fsspec address of such.

    A line is an object with `content`, a list of texts and of objects {"image": path}, and maybe an `id`, which names
    the sample (else the number of the line does). Paths are relative to the folder of the file and stay in it. Texts of
    white space alone are left out. Blocks are files.

    A line that is no such object is a damaged sample. Raises FileNotFoundError where a file is missing, and ValueError
    where there is no line at all.
    """

    def __init__(self, path: str) -> None:
        files = find_files(path, ".jsonl")
        found = zip(files, names_of(files), map_threads(_find_lines, files, NUM_INDEXERS), strict=True)
        self._files = [(file, printable(name), lines) for file, name, lines in found if len(lines)]
        self.blocks = [len(lines) for _, _, lines in self._files]
        """Lines of each file that has any."""
        self._starts = [0, *itertools.accumulate(self.blocks)]
        if not self._files:
            raise ValueError(f"there is no line in {path}; every line is a document")

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Interleaved:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        block = bisect.bisect_right(self._starts, index) - 1
        file, name, lines = self._files[block]
        number, start, length = (int(x) for x in lines[index - self._starts[block]])
        where = f"{name}/line {number}"
        try:
            if length > MAX_LINE_BYTES:
                raise ValueError(f"the line has {length} bytes; the limit is {MAX_LINE_BYTES}")
            sample_id, content = _parse(file.read(start, length), str(number))
            sample_id = f"{name}/{sample_id}"
            parts = [self._part(item, file, sample_id) for item in content]
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}: {error}") from error
        kept = tuple(part for part in parts if part is not None)
        if not kept:
            raise ValueError(f"{where}: content is empty")
        return Interleaved(sample_id, kept)

    def _part(self, item: Any, file: StoredFile, sample_id: str) -> str | LoadImage | None:
        if isinstance(item, str):
            return checked_text(item) if item.strip() else None
        if isinstance(item, dict) and isinstance(item.get("image"), str):
            name = item["image"]
            if not is_inside(name):
                raise ValueError(f"the image {name!r} leads out of the folder of the file; name it relative to that")
            return partial(_load_image, join(parent(file.address), name), file.is_local)
        raise ValueError('content holds something else than texts and {"image": "path"}')


def _parse(line: bytes, number: str) -> tuple[str, list[Any]]:
    """(id, content) of a line."""
    entry = parse_json(line)
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), list):
        raise ValueError('the line is no object like {"content": ["a cat:", {"image": "cat.jpg"}]}')
    name = entry.get("id", number)
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        raise ValueError(f"id is {name!r}; it is a text or a whole number")
    return printable(str(name)), entry["content"]


def _load_image(address: str, is_local: bool) -> Image.Image:
    if is_local:
        return load_image(address)
    file = stored_file(address)
    check_file_size(file.size, address)
    return decode_image(file.read(0, file.size), address)


def _find_lines(file: StoredFile) -> np.ndarray:
    """int64 [lines, 3]: number from 1, first byte and length of every line that is not empty."""
    ends = [np.array([-1])]
    for start in range(0, file.size, READ_BYTES):
        data = np.frombuffer(file.read(start, min(READ_BYTES, file.size - start)), np.uint8)
        ends.append(np.flatnonzero(data == ord("\n")) + start)
    if ends[-1].size == 0 or ends[-1][-1] != file.size - 1:
        ends.append(np.array([file.size]))
    all_ends = np.concatenate(ends)
    starts, lengths = all_ends[:-1] + 1, np.diff(all_ends) - 1
    lines = np.stack([np.arange(1, len(starts) + 1), starts, lengths], axis=1)
    return lines[lengths > 0]
