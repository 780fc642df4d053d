"""The source `webdataset`: captioned images in tars, where 0001.jpg and 0001.txt are one sample.

Each tar is read once, for an index of where its images lie and of all captions (`tar_samples.py` has the rules). The
index is kept beside a local tar (`photos.tar.<digits>.index`), or else in ~/.cache/lmfusion; images are read from the
tar by their offset. An index is made again when its tar has changed, or when the index is damaged.
"""

import functools
import os
from pathlib import Path
from typing import Any

from PIL import Image

from lmfusion.data.samples import CaptionedImage
from lmfusion.data.sources.base import Blocks
from lmfusion.data.sources.tar_index import Records, Summary, open_records, read_summary, save_index, to_arrays
from lmfusion.data.sources.tar_samples import MemberSelection, index_tar
from lmfusion.data.sources.unused_files import UnusedFiles, UnusedKind
from lmfusion.data.storage.files import StorageError, StoredFile, cached_name, find_files, names_of
from lmfusion.images.preprocessing import check_file_size, decode_image
from lmfusion.utils.prefetch import map_threads
from lmfusion.utils.printing import printable

NUM_INDEXERS = 8
"""Tars indexed at the same time: most of the work is waiting for the disk or the network."""
NUM_OPEN = 4096
"""Indexes mapped into memory at a time; a process may have some 65,000 such maps."""


class WebDataset(Blocks):
    """The source `webdataset`: a tar, a glob or brace pattern of tars, or an fsspec address of such.

    image: suffix of the members that are images; None: jpg, jpeg, png or webp. caption: suffix of the members that
    hold captions: "txt" (one on each line), "json" (at "caption" or "text"), or "json:KEY"; None: txt, or json where
    there is no txt. `tar_samples.py` says which members belong together; they may lie anywhere in the tar.

    A sample without image or caption, and a tar that is damaged or cut off, is one damaged sample each. Raises
    FileNotFoundError where a file is missing, StorageError where one cannot be read, and ValueError where there is no
    good sample at all.
    """

    def __init__(self, path: str, image: str | None = None, caption: str | None = None) -> None:
        self._selection = MemberSelection.parse(image, caption)
        self._files = find_files(path, ".tar")
        self._names = [printable(name) for name in names_of(self._files)]
        self._unsaved: dict[int, Records] = {}
        self._records = functools.lru_cache(maxsize=NUM_OPEN)(self._open_records)
        summaries = list(map_threads(self._prepare, range(len(self._files)), NUM_INDEXERS))
        self.set_blocks([summary.num_samples for summary in summaries])
        unused = UnusedFiles()
        for name, summary in zip(self._names, summaries, strict=True):
            unused.merge(
                UnusedKind(u.kind, u.count, [f"{name}/{member}" for member in u.names]) for u in summary.unused
            )
        self.unused = unused.list()
        """Members that look like images or captions but are in no sample."""
        if not any(summary.num_good for summary in summaries):
            raise ValueError(f"{path} must have captioned images, but has none: {self._reason(0)}")

    def __getitem__(self, index: int) -> CaptionedImage:
        tar, place = self.locate(index)
        record = self._records(tar)[place]
        sample_id = f"{self._names[tar]}/{record.key}" if record.key else self._names[tar]
        if record.reason is not None:
            raise ValueError(f"{sample_id}: {record.reason}")
        load_image = functools.partial(_load_image, self._files[tar], record.offset, record.size, sample_id)
        return CaptionedImage(sample_id, load_image, record.captions)

    def _reason(self, index: int) -> str:
        try:
            return self[index].sample_id
        except (ValueError, OSError) as error:
            return str(error)

    def _prepare(self, tar: int) -> Summary:
        """The summary of a tar, from its index, which is made if it is missing, damaged or out of date."""
        for path in self._index_paths(tar):
            summary = read_summary(path, self._made_of(tar))
            if summary is not None:
                return summary
        return self._index(tar)[0]

    def _index(self, tar: int) -> tuple[Summary, Records]:
        """Read through a tar, and save its index."""
        found, unused = index_tar(self._files[tar], self._selection)
        summary = Summary(len(found), sum(record.reason is None for record in found), unused)
        arrays = to_arrays(found)
        records = Records(arrays, len(found))
        if not any(save_index(path, self._made_of(tar), summary, arrays) for path in self._index_paths(tar)):
            self._unsaved[tar] = records
        return summary, records

    def _open_records(self, tar: int) -> Records:
        if tar in self._unsaved:
            return self._unsaved[tar]
        for path in self._index_paths(tar):
            records = open_records(path, self._made_of(tar))
            if records is not None:
                return records
        summary, records = self._index(tar)  # deleted or damaged since the data set was opened
        if summary.num_samples != self.blocks[tar]:
            raise StorageError(
                f"{self._files[tar].address} must not change while it is read; run the same command again"
            )
        return records

    def _index_paths(self, tar: int) -> list[Path]:
        """Where the index of a tar may lie, in order of preference."""
        file = self._files[tar]
        suffix = f".{self._selection.digest}.index"
        cached = cached_name(file.address if not file.is_local else os.path.abspath(file.address), suffix)
        return [Path(file.address + suffix), cached] if file.is_local else [cached]

    def _made_of(self, tar: int) -> dict[str, Any]:
        """What identifies the tar, and the settings that its index must have been made with."""
        file = self._files[tar]
        selection = [list(self._selection.images), list(self._selection.captions), self._selection.key]
        return {"size": file.size, "version": file.version, "choice": selection}


def _load_image(file: StoredFile, offset: int, size: int, name: str) -> Image.Image:
    check_file_size(size, name)
    return decode_image(file.read(offset, size), name)
