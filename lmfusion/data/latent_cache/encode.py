"""Encodes a source into a latent cache, shard by shard, by any number of processes at once.

A process claims a shard by a lock on one byte of the file .lock, which the system frees however the process ends. A
shard is written under another name, forced onto the disk, renamed, and then gets a record beside it (shard-N.json).
Once all shards have records, the manifest is written and replaces them. So a killed process loses only its current
shard. The contents of a shard depend only on the source, codec and tokenizer: the cache is always the same to the
byte.
"""

import datetime
import fcntl
import hashlib
import json
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
from safetensors.torch import save
from torch import Tensor

from lmfusion.data.config import KINDS_WITH_CONVERSATIONS, SourceConfig
from lmfusion.data.latent_cache.format import (
    FORMAT,
    MANIFEST,
    TEMPLATE_VARIABLES,
    DamageRecord,
    ShardRecord,
    check_same,
    made_with,
    read_manifest,
    shard_name,
    tables_sha256,
)
from lmfusion.data.latent_cache.shard_encoder import EncodeOptions, ShardEncoder
from lmfusion.data.registry import load_source
from lmfusion.data.samples import Source
from lmfusion.data.sources.unused_files import report_unused
from lmfusion.model.codec import Codec
from lmfusion.text.chat_template import TODAY, uses_date
from lmfusion.utils.config_values import to_values
from lmfusion.utils.files import LOCKING_UNSUPPORTED, atomic_write, replace_text
from lmfusion.utils.hashing import values_sha256

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
    """Encode the source that `config` names into `folder`, or continue there. Returns the manifest.

    Any number of processes may do this at the same time, with the same arguments and from any machine that shares the
    file system; each returns when the cache is complete. is_for_vlm: whether the cache is for a model with a
    vision-language base. template_variables: variables for the chat template; if they lack `today`, it is the date on
    which the cache was begun. report: called with the number of samples that were finished since the last call, by any
    process, and the number of all samples.

    Raises ValueError where the folder holds something else or a cache made differently, the codec has no posterior
    whose deviation could be kept, the source has input images of a vision-language model, or too many samples are
    damaged; OSError where a file cannot be written.
    """
    options = options or EncodeOptions()
    if config.kind == "latents":
        raise ValueError(f"the source must hold images, but {config.path} is a latent cache; encode its own source")
    if options.keep_std and not codec.has_posterior:
        raise ValueError(f"keep_std needs a codec with a posterior, got {codec.config.kind!r}; leave keep_std out")
    source = load_source(config, codec.config.image_size)
    report_unused(source, config.name)
    plan = _plan(source, config, codec, tokenizer, options)
    if config.kind in KINDS_WITH_CONVERSATIONS and template_variables:
        plan[TEMPLATE_VARIABLES] = dict(template_variables)
    prints_date = config.kind in KINDS_WITH_CONVERSATIONS and uses_date(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    num_shards = -(-len(source) // options.shard_samples)
    with _Claims(folder) as claims:
        with claims.waiting(0):
            plan = _agree(folder, plan, prints_date)
        variables = plan.get(TEMPLATE_VARIABLES, {})
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
    """Encode every shard that no process has finished or claimed. Returns whether any process made progress."""
    progress = False
    for number in sorted(set(range(num_shards)) - done):
        with claims.attempt(1 + number) as is_mine:
            record = _read_record(folder, number)
            if (folder / MANIFEST).is_file():  # after the record, which is deleted once the manifest exists
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
        """Hold the lock of a byte, once it is free."""
        self._lock(byte, fcntl.LOCK_EX)
        try:
            yield
        finally:
            self._lock(byte, fcntl.LOCK_UN)

    @contextmanager
    def attempt(self, byte: int) -> Iterator[bool]:
        """Hold the lock of a byte unless another process does. Yields whether it is held."""
        try:
            self._lock(byte, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows either where another process holds it
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
            self._can_lock = False  # shards are still written whole, but two processes may encode the same one
            print(f"{self._path} cannot be locked ({error.strerror}): start one process only", file=sys.stderr)


def _plan(source: Source, config: SourceConfig, codec: Codec, tokenizer: Any, options: EncodeOptions) -> dict[str, Any]:
    """What all processes must agree on, as values for JSON."""
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


def _agree(folder: Path, plan: dict[str, Any], prints_date: bool) -> dict[str, Any]:
    """The plan that `folder` follows: its own if it has one, which must agree with `plan` except for the source's path.

    prints_date: whether the chat template prints the date. A plan without a date gets the one on which it was begun.
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
            raise ValueError(f"the cache folder must be empty, but {folder} holds {min(others)}; give a new one")
        if prints_date:
            plan[TEMPLATE_VARIABLES] = {TODAY: datetime.date.today().isoformat(), **plan.get(TEMPLATE_VARIABLES, {})}
        _write_json(file, plan)
        return plan
    source = {key: value for key, value in plan["source"].items() if key != "path"}  # files may be moved
    if TEMPLATE_VARIABLES in plan or TEMPLATE_VARIABLES in found:
        kept = found.get(TEMPLATE_VARIABLES, {})
        date = {TODAY: kept[TODAY]} if prints_date and TODAY in kept else {}
        plan = {**plan, TEMPLATE_VARIABLES: {**date, **plan.get(TEMPLATE_VARIABLES, {})}}
        if plan[TEMPLATE_VARIABLES] != kept:
            raise ValueError(
                f"the template variables must be {kept}, with which the latent cache {folder} was begun, got "
                f"{plan[TEMPLATE_VARIABLES]}; give a new folder, or the settings it was begun with"
            )
    check_same(folder, {**plan, "source": source}, found, "give a new folder, or the settings it was begun with")
    return found


def _finish(folder: Path, plan: dict[str, Any], num_shards: int) -> dict[str, Any]:
    """Write the manifest unless it is there, and delete the files that it replaces. Returns the manifest."""
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
    for left in folder.glob("shard-*.partial"):  # of a process that was killed
        left.unlink(missing_ok=True)
    return read_manifest(folder)


def _write_shard(folder: Path, number: int, tensors: dict[str, Tensor], damaged: tuple[DamageRecord, ...]) -> None:
    path = folder / shard_name(number)
    try:
        data = save(tensors)
        record = ShardRecord(
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            tables_sha256=tables_sha256(tensors),
            num_images=tensors["mean"].shape[0],
            num_tokens=tensors["token_ids"].shape[0],
            damaged=damaged,
        )
        with atomic_write(path) as file:
            file.write(data)
        # The shard itself is on the disk by now, so a record never speaks of one that is not.
        _write_json(_record_path(folder, number), asdict(record))
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {error}; make room and run the same command again") from error


def _read_record(folder: Path, number: int) -> ShardRecord | None:
    """The record of a shard, or None if the shard is not complete."""
    try:
        record = ShardRecord.parse(json.loads(_record_path(folder, number).read_bytes()))
        return record if (folder / shard_name(number)).stat().st_size == record.size else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _record_path(folder: Path, number: int) -> Path:
    return (folder / shard_name(number)).with_suffix(".json")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    replace_text(path, json.dumps(values, indent=1))
