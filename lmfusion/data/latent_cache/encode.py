"""How is a source encoded once, so that training need not do it? Shard by shard, by any number of processes at once.

A process claims a shard by a lock on one byte of the file .lock, which the system frees however the process ends. A
shard is written under another name, forced onto the disk, renamed, and then has a record beside it (shard-N.json); the
manifest comes when all have one, and takes the records' place. So a killed process costs the shard it was at, and as
the contents of a shard depend on nothing but the source, codec and tokenizer, the cache becomes the same to the byte.
"""

import datetime
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lmfusion.data.latent_cache.reader import (
    FORMAT,
    MANIFEST,
    VARIABLES,
    DamageRecord,
    ShardRecord,
    check_same,
    made_with,
    read_manifest,
    shard_name,
    tables_sha256,
)
from lmfusion.data.latent_cache.shard_encoder import EncodeOptions, ShardEncoder
from lmfusion.data.samples import CONVERSING, Source, SourceConfig, load_source
from lmfusion.data.sources.unused_files import report_unused
from lmfusion.model.codec import Codec
from lmfusion.text.chat_template import TODAY, uses_date
from lmfusion.utils.config_values import to_values
from lmfusion.utils.files import LOCKING_UNSUPPORTED, flush, replace_text
from lmfusion.utils.hashing import file_sha256, values_sha256

PLAN = "plan.json"
POLL_SECONDS = 1.0


def encode_source(
    config: SourceConfig,
    folder: Path,
    *,
    codec: Codec,
    tokenizer: Any,
    device: torch.device | str = "cpu",
    options: EncodeOptions | None = None,
    is_for_vlm: bool = False,
    template_variables: Mapping[str, Any] | None = None,
    report: Callable[[int, int], object] = lambda num_done, total: None,
) -> dict[str, Any]:
    """Encode the source that `config` names into `folder`, or continue there; answers with the manifest.

    Any number of processes may do this at the same time, with the same arguments and from any machine that shares the
    file system; each returns when the cache is complete. is_for_vlm: whether the model is one made of a vision-language
    model. template_variables: what the chat template reads; without `today` it is told the date on which the cache was
    begun. `report` is told how many more samples are done, by whichever process, and how many there are in all.

    Raises ValueError where the folder holds something else or a cache made otherwise, the codec has no posterior whose
    deviation could be kept, a vision-language model sees images of the source, or too many samples are damaged; OSError
    where a file cannot be written.
    """
    options = options or EncodeOptions()
    if config.kind == "latents":
        raise ValueError(f"{config.path} is a latent cache already; encode the source it was made of")
    if options.keep_std and not codec.has_posterior:
        raise ValueError(f"codec {codec.config.kind!r} has no posterior whose variance could be kept; leave it out")
    source = load_source(config, codec.config.image_size)
    report_unused(source, config.name)
    plan = _plan(source, config, codec, tokenizer, options)
    if config.kind in CONVERSING and template_variables:
        plan[VARIABLES] = dict(template_variables)
    tells_date = config.kind in CONVERSING and uses_date(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    num_shards = -(-len(source) // options.shard_samples)
    with _Claims(folder) as claims:
        with claims.waiting(0):
            plan = _agree(folder, plan, tells_date)
        variables = plan.get(VARIABLES, {})
        encoder = ShardEncoder(source, codec.to(device), tokenizer, device, options, is_for_vlm, variables)
        done: set[int] = set()
        while not (folder / MANIFEST).is_file() and len(done) < num_shards:
            if not _pass(folder, claims, encoder, num_shards, done, lambda more: report(more, len(source))):
                time.sleep(POLL_SECONDS)  # what is left is being encoded by other processes; one may still die
        with claims.waiting(0):
            return _finish(folder, plan, num_shards)


def _pass(
    folder: Path,
    claims: "_Claims",
    encoder: ShardEncoder,
    num_shards: int,
    done: set[int],
    report: Callable[[int], object],
) -> bool:
    """Encode every shard that nobody has done or claimed. Answers whether there was progress, by whomever."""
    progress = False
    for number in sorted(set(range(num_shards)) - done):
        with claims.attempt(1 + number) as is_mine:
            record = _read_record(folder, number)
            if (folder / MANIFEST).is_file():  # asked after the record, which is deleted once the manifest is there
                return True
            if record is None:
                if not is_mine:
                    continue
                _write_shard(folder, number, *encoder.encode(number, report))
            else:
                report(len(encoder.indices(number)))
            done.add(number)
            progress = True
    return progress


class _Claims:
    """Locks on single bytes of a file, shared by all processes that encode into one folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self._can_lock = True

    def __enter__(self) -> "_Claims":
        self._file = open(self._path, "a")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @contextmanager
    def waiting(self, byte: int) -> Iterator[None]:
        """Hold a byte, once it is free."""
        self._lock(byte, fcntl.LOCK_EX)
        try:
            yield
        finally:
            self._lock(byte, fcntl.LOCK_UN)

    @contextmanager
    def attempt(self, byte: int) -> Iterator[bool]:
        """Hold a byte if no other process does. Gives whether it is held."""
        try:
            self._lock(byte, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # either is allowed to say "held by another"
            yield False
            return
        try:
            yield True
        finally:
            self._lock(byte, fcntl.LOCK_UN)

    def _lock(self, byte: int, operation: int) -> None:
        if not self._can_lock:
            return
        try:
            fcntl.lockf(self._file, operation, 1, byte)
        except OSError as error:
            if error.errno not in LOCKING_UNSUPPORTED:
                raise
            self._can_lock = False  # shards are still whole, but processes may do the same ones
            print(f"{self._path} cannot be locked ({error.strerror}): start one process only", file=sys.stderr)


def _plan(source: Source, config: SourceConfig, codec: Codec, tokenizer: Any, options: EncodeOptions) -> dict[str, Any]:
    """What all processes must agree on, as JSON has it."""
    described = {key: value for key, value in to_values(config).items() if key != "weight"}
    return {
        **made_with(codec, tokenizer),
        "source": described,
        "num_samples": len(source),
        "blocks": [[int(size), sum(1 for _ in run)] for size, run in groupby(source.blocks)],
        "shard_samples": options.shard_samples,
        "latent_shape": [codec.latent_channels, codec.latent_size, codec.latent_size],
        "dtype": options.dtype,
        "has_std": options.keep_std,
        "batch_size": options.batch_size,
    }


def _agree(folder: Path, plan: dict[str, Any], tells_date: bool) -> dict[str, Any]:
    """The plan that `folder` follows: its own, where that is the same but for the source's path; else `plan`.

    tells_date: whether conversations tell the date. A plan that names none has that on which the cache was begun.
    """
    file = folder / PLAN
    if (folder / MANIFEST).is_file():
        found = read_manifest(folder).get("plan", {})
    elif file.is_file():
        try:
            found = json.loads(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}; delete {folder} and start again") from error
    else:
        others = [entry.name for entry in folder.iterdir() if entry.name != ".lock" and not entry.name.startswith(PLAN)]
        if others:
            raise ValueError(f"{folder} holds other files ({min(others)}); give a new folder to encode into")
        if tells_date:
            plan[VARIABLES] = {TODAY: datetime.date.today().isoformat(), **plan.get(VARIABLES, {})}
        _write_json(file, plan)
        return plan
    source = {key: value for key, value in plan["source"].items() if key != "path"}  # files may be moved
    if VARIABLES in plan or VARIABLES in found:
        kept = found.get(VARIABLES, {})
        date = {TODAY: kept[TODAY]} if tells_date and TODAY in kept else {}
        plan = {**plan, VARIABLES: {**date, **plan.get(VARIABLES, {})}}
        if plan[VARIABLES] != kept:
            raise ValueError(
                f"the latent cache {folder} was begun with the template variables {kept}, not {plan[VARIABLES]}; give "
                "a new folder, or the settings it was begun with"
            )
    check_same(folder, {**plan, "source": source}, found, "give a new folder, or the settings it was begun with")
    return found


def _finish(folder: Path, plan: dict[str, Any], num_shards: int) -> dict[str, Any]:
    """Write the manifest unless it is there, and delete what it replaces. Answers with it."""
    if not (folder / MANIFEST).is_file():
        records = [_read_record(folder, number) for number in range(num_shards)]
        shards = [asdict(record) for record in records if record is not None]
        if len(shards) < num_shards:
            raise OSError(f"a shard of {folder} vanished while the last ones were encoded; run the same command again")
        values = {
            "plan": plan,
            "num_images": sum(shard["num_images"] for shard in shards),
            "num_tokens": sum(shard["num_tokens"] for shard in shards),
            "num_damaged": len({record["index"] for shard in shards for record in shard["damaged"]}),
            "shards": shards,
        }
        _write_json(folder / MANIFEST, {"format": FORMAT, **values, "sha256": values_sha256(values)})
    for number in range(num_shards):
        _record_path(folder, number).unlink(missing_ok=True)
    (folder / PLAN).unlink(missing_ok=True)
    for left in folder.glob(".tmp*"):  # safetensors writes under such a name first; a killed process left it
        left.unlink(missing_ok=True)
    return read_manifest(folder)


def _write_shard(folder: Path, number: int, tensors: dict[str, Tensor], damaged: tuple[DamageRecord, ...]) -> None:
    path = folder / shard_name(number)
    partial = path.with_suffix(".partial")
    try:
        partial.unlink(missing_ok=True)  # it may be a symbolic link, which some versions of safetensors write through
        save_file(tensors, partial)
        partial.chmod((folder / ".lock").stat().st_mode)  # safetensors makes files private
        flush(partial)
        record = ShardRecord(
            size=partial.stat().st_size,
            sha256=file_sha256(partial),
            tables_sha256=tables_sha256(tensors),
            num_images=tensors["mean"].shape[0],
            num_tokens=tensors["token_ids"].shape[0],
            damaged=damaged,
        )
        os.replace(partial, path)
        flush(folder)  # the shard is there before its record says so
        _write_json(_record_path(folder, number), asdict(record))
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}; make room and run the same command again") from error


def _read_record(folder: Path, number: int) -> ShardRecord | None:
    """The record of a shard that is complete, else None."""
    try:
        record = ShardRecord.of(json.loads(_record_path(folder, number).read_bytes()))
        return record if (folder / shard_name(number)).stat().st_size == record.size else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _record_path(folder: Path, number: int) -> Path:
    return (folder / shard_name(number)).with_suffix(".json")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    replace_text(path, json.dumps(values, indent=1))
