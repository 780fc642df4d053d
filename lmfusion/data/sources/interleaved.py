"""Documents of texts and images in their order, conversations, and edits: lines of JSON that name image files.

{"id": "page 7", "content": ["A cat:", {"image": "cats/1.jpg"}, "And a dog:", {"image": "dogs/4.png"}]}
{"messages": [{"role": "user", "content": "Draw a cat."}, {"role": "assistant", "content": [{"image": "cats/1.jpg"}]}]}
{"source": "cats/1.jpg", "instruction": "make the cat black", "target": "cats/1-black.jpg"}

Conversations may also be written as OpenAI, transformers, LLaVA and ShareGPT do: see conversation_formats.
"""

import base64
import binascii
import re
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from lmfusion.data.samples import Conversation, Edit, Interleaved, LoadImage, Message
from lmfusion.data.sources import conversation_formats
from lmfusion.data.sources.base import Blocks
from lmfusion.data.sources.captions import MAX_LINE_BYTES, checked_text, parse_json
from lmfusion.data.sources.conversation_formats import Part, read_content, read_conversation
from lmfusion.data.storage.files import (
    StorageError,
    StoredFile,
    find_files,
    is_inside,
    join,
    load_image_file,
    names_of,
    parent,
    stored_file,
)
from lmfusion.images.preprocessing import check_file_size, decode_image
from lmfusion.utils.prefetch import map_threads
from lmfusion.utils.printing import printable

EDIT_KEYS = ("source", "instruction", "target")
NUM_INDEXERS = 8
"""Files whose lines are found at the same time."""
READ_BYTES = 8 * 1024 * 1024
"""Read at once while finding the lines."""
_ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*\{")
"""How a file begins that is one JSON array of objects, as LLaVA's are."""


class InterleavedFiles(Blocks):
    """The source `interleaved`: a jsonl file, a glob or brace pattern of them, or an fsspec address of such.

    A line is an object with `content`, a list of texts and of objects {"image": path}, and maybe an `id`, which names
    the sample (else the number of the line does). Instead of content it may have `messages` or `conversations`, as
    `conversation_formats` reads them; or `source`, `instruction` and `target`, two paths and what makes one image of
    the other. Images are paths relative to the folder of the file, which they must not leave, or data URLs. Texts of
    white space alone are left out, but an instruction must say something. Blocks are files.

    A line that is no such object is a damaged sample. Raises FileNotFoundError where a file is missing, and ValueError
    where there is no line at all, or where a file is one JSON array.
    """

    def __init__(self, path: str) -> None:
        files = find_files(path, ".jsonl")
        found = zip(files, names_of(files), map_threads(_find_lines, files, NUM_INDEXERS), strict=True)
        self._files = [(file, printable(name), lines) for file, name, lines in found if len(lines)]
        self.set_blocks([len(lines) for _, _, lines in self._files])
        if not self._files:
            raise ValueError(f"there is no line in {path}; every line is a document")

    def __getitem__(self, index: int) -> Interleaved | Conversation | Edit:
        block, place = self.locate(index)
        file, name, lines = self._files[block]
        number, start, length = (int(x) for x in lines[place])
        where = f"{name}/line {number}"
        try:
            if length > MAX_LINE_BYTES:
                raise ValueError(f"the line has {length} bytes; the limit is {MAX_LINE_BYTES}")
            own_id, entry = _parse(file.read(start, length), str(number))
            sample_id = f"{name}/{own_id}"
            if any(isinstance(entry.get(key), list) for key in conversation_formats.KEYS):
                return Conversation(sample_id, self._messages(entry, file))
            if isinstance(entry.get("content"), list):  # which may have a "source" of another kind
                return Interleaved(sample_id, self._parts(read_content(entry["content"]), file))
            return self._edit(sample_id, entry, file)
        except StorageError:
            raise
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}: {error}") from error

    def _messages(self, entry: dict[str, Any], file: StoredFile) -> tuple[Message, ...]:
        return tuple({"role": role, "content": self._parts(parts, file)} for role, parts in read_conversation(entry))

    def _edit(self, sample_id: str, entry: dict[str, Any], file: StoredFile) -> Edit:
        for name in EDIT_KEYS:
            if not isinstance(entry.get(name), str) or not entry[name].strip():
                raise ValueError(
                    f'{name} is {entry.get(name)!r:.80}; an edit is like {{"source": "a.png", "instruction": "make it '
                    'blue", "target": "b.png"}'
                )
        source, target = (self._image(entry[name], file) for name in ("source", "target"))
        return Edit(sample_id, source, checked_text(entry["instruction"]), target)

    def _parts(self, content: list[Part], file: StoredFile) -> tuple[str | LoadImage, ...]:
        kept: list[str | LoadImage] = []
        for part in content:
            if not isinstance(part, str):
                kept.append(self._image(part.address, file))
            elif part.strip():
                kept.append(checked_text(part))
        if not kept:
            raise ValueError("content is empty")
        return tuple(kept)

    def _image(self, name: str, file: StoredFile) -> LoadImage:
        if name[:5].lower() == "data:":
            return partial(_load_data_url, name)
        if re.match(r"https?://", name, re.IGNORECASE):
            raise ValueError(
                f"the image {name[:200]!r} is on the web and is not fetched; download it and name the file"
            )
        if not is_inside(name):
            raise ValueError(f"the image {name!r} leads out of the folder of the file; name it relative to that")
        return partial(_load_image, join(parent(file.address), name), file.is_local)


def _parse(line: bytes, number: str) -> tuple[str, dict[str, Any]]:
    """The id of a line, and the object with its content or messages, a list, or with an edit."""
    entry = parse_json(line)
    if isinstance(entry, dict):  # tables that are written as JSON have every column in every line
        entry = {key: value for key, value in entry.items() if value is not None}
    keys = ("content", *conversation_formats.KEYS)
    lists = [key for key in keys if isinstance(entry, dict) and isinstance(entry.get(key), list)]
    if not lists and not (isinstance(entry, dict) and any(key in entry for key in EDIT_KEYS)):
        raise ValueError(
            'the line must be an object like {"content": ["a cat:", {"image": "cat.jpg"}]}, a conversation or an edit'
        )
    if sum(key in entry for key in keys) > 1:
        raise ValueError(f"the line must be a document or a conversation; it has more than one of {', '.join(keys)}")
    name = entry.get("id", number)
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        raise ValueError(f"id is {name!r}; it is a text or a whole number")
    return printable(str(name)), entry


def _load_image(address: str, is_local: bool) -> Image.Image:
    if is_local:
        return load_image_file(address)
    file = stored_file(address)
    check_file_size(file.size, address)
    return decode_image(file.read(0, file.size), address)


def _load_data_url(url: str) -> Image.Image:
    """The image in data:image/png;base64,..."""
    header, _, data = url.partition(",")
    if not header.lower().endswith(";base64"):
        raise ValueError("a data URL must be like data:image/png;base64,...")
    try:
        return decode_image(base64.b64decode("".join(data.split()), validate=True), "the data URL")
    except binascii.Error as error:
        raise ValueError(f"the data URL is damaged: {error}") from None


def _find_lines(file: StoredFile) -> np.ndarray:
    """int64 [lines, 3]: number from 1, first byte and length of every line that is not blank."""
    if _ARRAY.match(file.read(0, min(64, file.size))):
        raise ValueError(
            f"{file.address} is a JSON array; write one object on each line, as `jq -c '.[]' in.json > out.jsonl` does"
        )
    ends, num_written = [np.array([-1])], [np.array([0])]  # of the letters up to each end, those that are not blank
    total = 0
    for start in range(0, file.size, READ_BYTES):
        data = np.frombuffer(file.read(start, min(READ_BYTES, file.size - start)), np.uint8)
        found = np.flatnonzero(data == ord("\n"))
        written = np.cumsum(~np.isin(data, np.frombuffer(b" \t\r\n", np.uint8)), dtype=np.int64) + total
        ends.append(found + start)
        num_written.append(written[found])
        total = int(written[-1])
    if ends[-1].size == 0 or ends[-1][-1] != file.size - 1:
        ends.append(np.array([file.size]))
        num_written.append(np.array([total]))
    all_ends = np.concatenate(ends)
    starts, lengths = all_ends[:-1] + 1, np.diff(all_ends) - 1
    lines = np.stack([np.arange(1, len(starts) + 1), starts, lengths], axis=1)
    return lines[np.diff(np.concatenate(num_written)) > 0]
