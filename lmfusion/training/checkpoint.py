"""Checkpoints: atomic, hashed, and resumable on any number of ranks.

They are written by hand instead of by torch.distributed.checkpoint, which does not give these three together: files are
hashed while they are written, nothing is pickled, and a checkpoint exists completely or not at all. A rename puts it in
place:

<run>/checkpoints/step-00001000/
    weights.00000-of-00002.safetensors     the rows (of dimension 0) of trained tensors that rank 0 of 2 holds
    optimizer.*, ema.*                     the same of the optimizer's state and of the averages
    state.json                             counts, and the identity of the run
    manifest.json                          size, sha256 and rows of each file, and its own sha256; written last

Every rank writes its own rows, and any number of ranks can read them. Frozen weights are not saved.
"""

import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmfusion.training.distributed import World, local_range, local_shard
from lmfusion.utils.config_values import short_repr
from lmfusion.utils.files import check_no_link, flush, name_os_errors
from lmfusion.utils.hashing import values_sha256

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 3
BLOCK_BYTES = 2**24

Range = tuple[int, int, int]
"""(first, end, size): the rows [first, end) of a tensor with `size` rows. A tensor without dimensions has one row."""


class Slice(NamedTuple):
    """Consecutive rows of a tensor that is divided among the ranks."""

    rows: Tensor
    range: Range


Parts = Mapping[str, Mapping[str, Tensor | Slice]]
"""Named tensors by part: whole tensors, tensors that FSDP2 shards, or rows of a tensor."""


def slice_of(tensor: Tensor) -> Slice:
    """The rows of `tensor` that this rank holds, sharing its memory; all of them if it is not sharded."""
    return Slice(local_shard(tensor.detach()), local_range(tensor))


def ranges(parts: Parts) -> dict[str, dict[str, Range]]:
    """The rows of each tensor that this rank holds, for `load_checkpoint`."""
    return {
        part: {name: t.range if isinstance(t, Slice) else local_range(t) for name, t in tensors.items()}
        for part, tensors in parts.items()
    }


@torch.no_grad()
def restore(held: Mapping[str, Tensor | Slice], saved: Mapping[str, Tensor]) -> None:
    """Copy the rows that `load_checkpoint` returned into their tensors, one tensor at a time.

    Raises ValueError, naming the tensor, if the shapes or dtypes differ.
    """
    for name, tensor in held.items():
        rows, found = (tensor if isinstance(tensor, Slice) else slice_of(tensor)).rows, saved[name]
        if (rows.shape, rows.dtype) != (found.shape, found.dtype):
            raise ValueError(
                f"{name} must be {rows.dtype} {list(rows.shape)} as in the model, got {found.dtype} "
                f"{list(found.shape)} in the checkpoint of another model or optimizer; change these back, or set "
                "output to another folder"
            )
        rows.copy_(found)


class CheckpointWriter:
    """Writes checkpoints into a folder that all ranks see, while training continues.

    All ranks call the same methods in the same order.
    """

    def __init__(self, folder: Path, keep_last: int, world: World) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.world = world
        self._writing: _Writing | None = None
        self._known_step: int | None = None

    def find(self) -> Path | None:
        """The newest checkpoint, the same on every rank; None if there is none, or if this writer has read or begun it.

        Call it while the run's folder is locked: another process may have continued the run until then.
        """
        step = latest_step(self.folder, self.world)
        if step is None or step == self._known_step:
            return None
        self._known_step = step
        return checkpoint_path(self.folder, step)

    def save(self, step: int, parts: Parts, state: Mapping[str, Any]) -> None:
        """Begin the checkpoint of `step`: copy this rank's rows of `parts` to the CPU, and write them in a thread.

        state: JSON values; rank 0's are saved. Waits for an earlier checkpoint that is still being written, and raises
        what `finish` does. An existing checkpoint of `step` is left as it is.
        """
        self.finish()
        self._known_step = step
        exists = False
        if self.world.rank == 0:
            for leftover in self.folder.glob("*.tmp"):  # killed runs leave them
                shutil.rmtree(leftover, ignore_errors=True)
            exists = step in list_steps(self.folder)
        if self.world.sum_integers([exists])[0]:  # this also keeps all ranks from writing before rank 0 has cleaned up
            return
        text = json.dumps({**state, "step": step}, indent=1)
        copied = {part: _copied(tensors, self.world.rank) for part, tensors in parts.items()}
        self._writing = _Writing(checkpoint_path(self.folder, step), copied, text, self.world)
        self._writing.start()

    def poll(self) -> None:
        """Between steps: complete the checkpoint if all ranks have written theirs. Raises as `finish` does."""
        if self._writing is None:
            return
        counts = [not self._writing.is_alive(), self._writing.error is not None]
        num_written, num_failed = self.world.sum_integers(counts)
        if num_written == self.world.size:
            self._complete(num_failed)

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is complete.

        Raises OSError on all ranks if one of them could not write it (a full disk, say); earlier ones are intact.
        """
        if self._writing is not None:
            self._writing.join()
            self.poll()

    def _complete(self, num_failed: int) -> None:
        assert self._writing is not None
        writing, self._writing = self._writing, None
        error = writing.error
        if self.world.rank == 0 and not num_failed:
            try:
                self._publish(writing)
            except (OSError, ValueError) as publishing_error:
                error = publishing_error
        num_failed = self.world.sum_integers([error is not None])[0]
        if num_failed == 0:
            return
        if self.world.rank == 0:
            shutil.rmtree(writing.folder, ignore_errors=True)
        steps = list_steps(self.folder)
        kept = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is no earlier one"
        reason = error or f"{num_failed} of {self.world.size} ranks failed, each gives its reason"
        message = f"cannot write {writing.target}: {reason}; {kept}. Make room and run the same command again"
        raise OSError(message) from error

    def _publish(self, writing: "_Writing") -> None:
        """Complete the checkpoint, and only then delete old ones."""
        files: dict[str, Any] = {}
        for rank in range(self.world.size):
            record = writing.record_path(rank)
            if not record.is_file():
                raise OSError(f"all ranks must write to one shared folder; rank 0 does not see that of rank {rank}")
            files |= json.loads(record.read_text(encoding="utf-8"))
            record.unlink()
        manifest = {"format": FORMAT, "files": files}
        _write_text(writing.folder / MANIFEST, json.dumps({**manifest, "sha256": values_sha256(manifest)}))
        flush(writing.folder)
        writing.folder.rename(writing.target)
        flush(self.folder)
        _check_sizes(writing.target, _read_manifest(writing.target)["files"])
        for old in list_steps(self.folder)[: -self.keep_last]:
            path = checkpoint_path(self.folder, old)
            try:
                # Renamed first, so that a kill never leaves half of a checkpoint under its final name
                shutil.rmtree(path.rename(path.with_suffix(".tmp")))
            except OSError as error:  # not a reason to stop: the new checkpoint is complete
                print(f"cannot delete the old checkpoint {path}: {error}", file=sys.stderr)


class _Writing(threading.Thread):
    """Writes one rank's files of one checkpoint. If it is killed, its folder's name shows that it is incomplete."""

    def __init__(self, target: Path, parts: dict[str, dict[str, Slice]], state: str, world: World) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.target = target
        self.folder = target.with_suffix(".tmp")
        self.error: Exception | None = None
        self._parts = parts
        self._state = state
        self._world = world

    def record_path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"

    def run(self) -> None:
        try:
            self._write()
        except Exception as error:  # `CheckpointWriter` reports it on all ranks together
            self.error = error

    def _write(self) -> None:
        rank, size = self._world.rank, self._world.size
        self.folder.mkdir(parents=True, exist_ok=True)  # the first rank creates it
        check_no_link(self.folder)
        files: dict[str, Any] = {}
        for part, slices in self._parts.items():
            if slices:
                name = f"{part}.{rank:05d}-of-{size:05d}.safetensors"
                files[name] = _write_tensors(self.folder / name, {key: s.rows for key, s in slices.items()})
                files[name]["ranges"] = {key: s.range for key, s in slices.items()}
        if rank == 0:
            files[STATE] = _write_text(self.folder / STATE, self._state)
        for name, expected in files.items():  # read from the disk again, to find silent write errors
            if _sha256(self.folder / name, from_disk=True) != expected["sha256"]:
                raise OSError(f"{self.folder / name} does not read back as it was written; check the disk")
        _write_text(self.record_path(rank), json.dumps(files))
        flush(self.folder)


def load_checkpoint(
    path: Path, wanted: Mapping[str, Mapping[str, Range]] | None = None
) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
    """Parts and state of the checkpoint at `path`, on the CPU, whatever number of ranks wrote it.

    wanted: the rows of each tensor to read, by part and name (see `ranges`); None: all rows of all tensors. Files are
    compared with the manifest at once: the sizes of all files, and the sha256 of files with wanted rows. Tensors are
    read only when they are accessed, so that no more need be in memory than the caller keeps.

    Raises ValueError, naming the file or tensor, for a file that is missing, damaged or of another format, for a folder
    with the name of another step, and for a tensor that is missing or has another number of rows; OSError, naming it,
    for a file that cannot be read.
    """
    entries = _read_manifest(path)["files"]
    _check_sizes(path, entries)
    saved: dict[str, dict[str, list[_Piece]]] = {}
    for file, entry in entries.items():
        for name, rows in entry.get("ranges", {}).items():
            saved.setdefault(file.split(".")[0], {}).setdefault(name, []).append(_Piece(path / file, *rows))
    if wanted is None:
        wanted = {part: {name: (0, p[0].size, p[0].size) for name, p in held.items()} for part, held in saved.items()}
    parts: dict[str, Mapping[str, Tensor]] = {}
    needed = {path / STATE}
    for part, names in wanted.items():
        held = saved.get(part, {})
        pieces = {name: _pieces_with(path, f"{part}/{name}", held.get(name, []), rows) for name, rows in names.items()}
        parts[part] = _SavedPart(path, {name: (rows, pieces[name]) for name, rows in names.items()})
        needed |= {piece.file for found in pieces.values() for piece in found}
    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
        for file, digest in pool.map(lambda file: (file, _sha256(file)), sorted(needed)):
            if digest != entries[file.name]["sha256"]:
                raise _damaged(file, path)
    with name_os_errors(path / STATE):
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    if path.name.startswith("step-") and path.name != checkpoint_path(path, state["step"]).name:
        raise ValueError(f"{path} holds step {state['step']}; give it that step's name again, or delete it")
    return parts, state


class _Piece(NamedTuple):
    """The rows [first, end) of a tensor with `size` rows, and the file that holds them."""

    file: Path
    first: int
    end: int
    size: int


class _SavedPart(Mapping[str, Tensor]):
    """Tensors by name, each read from its pieces when it is accessed."""

    def __init__(self, path: Path, wanted: Mapping[str, tuple[Range, list[_Piece]]]) -> None:
        self._path = path
        self._wanted = wanted
        self._open: dict[Path, Any] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._wanted)

    def __len__(self) -> int:
        return len(self._wanted)

    def __getitem__(self, name: str) -> Tensor:
        (first, end, _), pieces = self._wanted[name]
        read = [self._read(piece, name, max(first, piece.first), min(end, piece.end)) for piece in pieces]
        return read[0] if len(read) == 1 else torch.cat(read)

    def _read(self, piece: _Piece, name: str, first: int, end: int) -> Tensor:
        try:
            if piece.file not in self._open:
                self._open[piece.file] = safe_open(piece.file, framework="pt")
            file = self._open[piece.file]
            if (first, end) == (piece.first, piece.end):
                return file.get_tensor(name)
            return file.get_slice(name)[first - piece.first : end - piece.first]
        except (OSError, SafetensorError):  # its hash was right a moment ago
            raise _damaged(piece.file, self._path) from None


def _pieces_with(path: Path, name: str, pieces: list[_Piece], rows: Range) -> list[_Piece]:
    """The pieces that hold some of `rows`, in order. For an empty range, one piece beside it, for the shape."""
    first, end, size = rows
    if not pieces or pieces[0].size != size:
        found = f"{pieces[0].size} rows" if pieces else "none"
        raise ValueError(
            f"{path} must hold {size} rows of {name}, got {found}: it belongs to another model or optimizer; change "
            "these back, or set output to another folder"
        )
    needed = sorted((p for p in pieces if p.first < end and first < p.end), key=lambda p: p.first)
    if first == end:
        needed = [p for p in pieces if p.first <= first <= p.end][:1]
    at = first
    for piece in needed:
        at = piece.end if piece.first <= at else at
    if at < end or not needed:
        raise _damaged(path / MANIFEST, path)
    return needed


def list_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending."""
    if not folder.is_dir():
        return []
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal())


def latest_step(folder: Path, world: World) -> int | None:
    """Step of the newest checkpoint that rank 0 sees in `folder`, the same on every rank; None if there is none."""
    steps = list_steps(folder) if world.rank == 0 else []
    latest = world.sum_integers([1 + steps[-1] if steps else 0])[0]
    return latest - 1 if latest else None


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _copied(tensors: Mapping[str, Tensor | Slice], rank: int) -> dict[str, Slice]:
    """Copies on the CPU of what this rank writes: its own rows, and on rank 0 also the tensors that all ranks hold."""
    copied = {}
    for name, tensor in tensors.items():
        rows, (first, end, size) = tensor if isinstance(tensor, Slice) else slice_of(tensor)
        if rank == 0 or 0 < end - first < size:
            held = torch.empty(rows.shape, dtype=rows.dtype)
            copied[name] = Slice(held.copy_(rows), (first, end, size))
    return copied


_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file; returns its size and sha256.

    `safetensors.save_file` cannot hash while it writes, and would need a second copy in memory.
    """
    # Widest dtypes first: then all tensors are aligned, as the format asks
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    blocks = [len(text).to_bytes(8, "little") + text]
    return _write(path, [*blocks, *(tensor.flatten().view(torch.uint8).numpy() for _, tensor in ordered)])


def _write_text(path: Path, text: str) -> dict[str, Any]:
    return _write(path, [text.encode()])


def _write(path: Path, contents: Iterable[Any]) -> dict[str, Any]:
    """Write bytes and force them onto the disk; returns their size and sha256."""
    digest = hashlib.sha256()
    with name_os_errors(path), open(path, "wb") as file:
        for content in contents:
            view = memoryview(content)
            for start in range(0, len(view), BLOCK_BYTES):
                block = view[start : start + BLOCK_BYTES]
                file.write(block)
                digest.update(block)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return {"size": size, "sha256": digest.hexdigest()}


def _sha256(path: Path, from_disk: bool = False) -> str:
    """sha256 of a file's bytes. from_disk: drop the page cache first, so that the disk itself is read."""
    with name_os_errors(path), open(path, "rb") as file:
        if from_disk:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        with name_os_errors(file):
            manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, FileNotFoundError, IsADirectoryError):
        raise _damaged(file, path) from None
    if not isinstance(manifest, dict):
        raise _damaged(file, path)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} must have format {FORMAT}, got {short_repr(manifest.get('format'))}, of another version of "
            "lmfusion; start a new run in another folder, or finish this one with the version that began it"
        )
    if manifest.pop("sha256", None) != values_sha256(manifest):
        raise _damaged(file, path)
    return manifest


def _check_sizes(path: Path, entries: Mapping[str, Any]) -> None:
    for name, expected in entries.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != expected["size"]:
            raise _damaged(file, path)


def _damaged(file: Path, checkpoint: Path) -> ValueError:
    has_others = len(list_steps(checkpoint.parent)) > 1
    way_out = "to resume from the checkpoint before it" if has_others else "to begin again, since there is no other"
    return ValueError(f"{file} is damaged or missing; delete {checkpoint} {way_out}")
