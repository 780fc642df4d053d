"""The source `interleaved`: documents, conversations and edits as lines of JSON that name image files.

{"id": "page 7", "content": ["A cat:", {"image": "cats/1.jpg"}, "And a dog:", {"image": "dogs/4.png"}]}
{"messages": [{"role": "user", "content": "Draw a cat."}, {"role": "assistant", "content": [{"image": "cats/1.jpg"}]}]}
{"source": "cats/1.jpg", "instruction": "make the cat black", "target": "cats/1-black.jpg"}

Conversations may also be written as OpenAI, transformers, LLaVA and ShareGPT do: see conversation_formats.
"""

import re
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from lmfusion.data.samples import Conversation, Edit, Interleaved, LoadImage, Message
from lmfusion.data.sources import conversation_formats
from lmfusion.data.sources.base import Blocks
from lmfusion.data.sources.captions import MAX_LINE_BYTES, check_unicode, parse_json
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
from lmfusion.images.data_url import data_url_bytes, is_data_url
from lmfusion.images.preprocessing import check_file_size, decode_image
from lmfusion.utils.prefetch import map_threads
from lmfusion.utils.printing import printable

EDIT_KEYS = ("source", "instruction", "target")
NUM_INDEXERS = 8
"""Files whose lines are found at the same time."""
READ_BYTES = 8 * 1024 * 1024
"""Bytes read at a time while finding the lines."""
_ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*\{")
"""The beginning of a file that is one JSON array of objects, as LLaVA writes them."""


class InterleavedFiles(Blocks):
    """The source `interleaved`: a jsonl file, a glob or brace pattern of them, or an fsspec address of such.

    A line is an object with `content`, a list of texts and of objects {"image": path}, and optionally an `id` that
    names the sample (default: the number of the line). Instead of content it may have `messages` or `conversations`, as
    `conversation_formats` reads them; or `source`, `instruction` and `target`, the paths of two images and the text
    that turns the first into the second. Images are paths relative to the folder of the file, which they must not
    leave, or data URLs. Texts of only white space are left out; an instruction must not be empty. Blocks are files.

    A line that is not such an object is a damaged sample. Raises FileNotFoundError where a file is missing, and
    ValueError where there is no line at all, or where a file is one JSON array.
    """

    def __init__(self, path: str) -> None:
        files = find_files(path, ".jsonl")
        found = zip(files, names_of(files), map_threads(_find_lines, files, NUM_INDEXERS), strict=True)
        self._files = [(file, printable(name), lines) for file, name, lines in found if len(lines)]
        self.set_blocks([len(lines) for _, _, lines in self._files])
        if not self._files:
            raise ValueError(f"{path} must have at least one line, a JSON object, but is empty")

    def __getitem__(self, index: int) -> Interleaved | Conversation | Edit:
        block, place = self.locate(index)
        file, name, lines = self._files[block]
        number, start, length = (int(x) for x in lines[place])
        where = f"{name}/line {number}"
        try:
            if length > MAX_LINE_BYTES:
                raise ValueError(f"the line must have at most {MAX_LINE_BYTES} bytes, got {length}")
            own_id, entry = _parse(file.read(start, length), str(number))
            sample_id = f"{name}/{own_id}"
            if any(isinstance(entry.get(key), list) for key in conversation_formats.KEYS):
                return Conversation(sample_id, self._messages(entry, file))
            if isinstance(entry.get("content"), list):  # checked before "source", which documents may have too
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
                    f"{name} must be a text that is not empty, got {entry.get(name)!r:.80}; an edit is like "
                    '{"source": "a.png", "instruction": "make it blue", "target": "b.png"}'
                )
        source, target = (self._image(entry[name], file) for name in ("source", "target"))
        return Edit(sample_id, source, check_unicode(entry["instruction"]), target)

    def _parts(self, content: list[Part], file: StoredFile) -> tuple[str | LoadImage, ...]:
        kept: list[str | LoadImage] = []
        for part in content:
            if not isinstance(part, str):
                kept.append(self._image(part.address, file))
            elif part.strip():
                kept.append(check_unicode(part))
        if not kept:
            raise ValueError("content is empty")
        return tuple(kept)

    def _image(self, name: str, file: StoredFile) -> LoadImage:
        if is_data_url(name):
            return partial(_load_data_url, name)
        if re.match(r"https?://", name, re.IGNORECASE):
            raise ValueError(
                f"an image must be a file, got {name[:200]!r}, which is not fetched; download it and name the file"
            )
        if not is_inside(name):
            raise ValueError(f"the path of an image must stay in the folder of the jsonl file, got {name!r}")
        return partial(_load_image, join(parent(file.address), name), file.is_local)


def _parse(line: bytes, number: str) -> tuple[str, dict[str, Any]]:
    """The id of a line, and its object: with a list of contents or messages, or with an edit."""
    entry = parse_json(line)
    if isinstance(entry, dict):  # tables written as JSON have every key in every line, with null
        entry = {key: value for key, value in entry.items() if value is not None}
    keys = ("content", *conversation_formats.KEYS)
    lists = [key for key in keys if isinstance(entry, dict) and isinstance(entry.get(key), list)]
    if not lists and not (isinstance(entry, dict) and any(key in entry for key in EDIT_KEYS)):
        raise ValueError(
            'the line must be an object like {"content": ["a cat:", {"image": "cat.jpg"}]}, a conversation or an edit'
        )
    if sum(key in entry for key in keys) > 1:
        raise ValueError(f"the line must have only one of {', '.join(keys)}: it is a document or a conversation")
    name = entry.get("id", number)
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        raise ValueError(f"id must be a text or a whole number, got {name!r}")
    return printable(str(name)), entry


def _load_image(address: str, is_local: bool) -> Image.Image:
    if is_local:
        return load_image_file(address)
    file = stored_file(address)
    check_file_size(file.size, address)
    return decode_image(file.read(0, file.size), address)


def _load_data_url(url: str) -> Image.Image:
    return decode_image(data_url_bytes(url), "the data URL")


def _find_lines(file: StoredFile) -> np.ndarray:
    """int64 [lines, 3]: number from 1, first byte and length of every line that is not blank."""
    if _ARRAY.match(file.read(0, min(64, file.size))):
        raise ValueError(
            f"{file.address} must have one object on each line, but is a JSON array; `jq -c '.[]' in.json > out.jsonl` "
            "converts it"
        )
    ends, num_written = [np.array([-1])], [np.array([0])]  # characters up to each end that are not blank
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
