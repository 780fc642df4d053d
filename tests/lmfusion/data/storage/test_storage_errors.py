"""Storage that fails for a moment changes no number; storage that goes on failing stops the run."""

import errno
import json
import os
import threading

import numpy as np
import pytest
from PIL import Image

from lmfusion.cli import main
from lmfusion.data import SourceConfig, load_source
from lmfusion.data.inspect import read_all
from lmfusion.data.latent_cache.encode import encode_source
from lmfusion.data.latent_cache.shard_encoder import EncodeOptions
from lmfusion.data.pipeline.loader import LoaderState
from lmfusion.data.storage import files as remote_module
from lmfusion.data.storage.files import StorageError, load_image_file
from lmfusion.model.codec import CodecConfig, load_codec
from lmfusion.vae.config import AutoencoderConfig, ImageDataConfig
from lmfusion.vae.images import ImageLoader
from tests.lmfusion.data.pipeline.loaders import contents, packed_loader, read
from tests.lmfusion.data.storage.stored import encoded, tar_bytes

NUM_SAMPLES = 40
KINDS = ("folder", "webdataset", "parquet", "interleaved", "edits", "remote")


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_module, "RETRY_SECONDS", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def stored(tmp_path):
    """The same samples in every kind of source, as (kind, path)."""
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "set").mkdir()
    images = [encoded("PNG", Image.new("L", (8, 8), i)) for i in range(NUM_SAMPLES)]
    captions = [f"number {i}" + "!" * (i % 23) for i in range(NUM_SAMPLES)]
    members = []
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        (tmp_path / "set" / f"{i:03d}.png").write_bytes(image)
        (tmp_path / "set" / f"{i:03d}.txt").write_text(caption)
        members += [(f"{i:03d}.png", image), (f"{i:03d}.txt", caption.encode())]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    pq.write_table(pa.table({"image": images, "caption": captions}), tmp_path / "a.parquet", row_group_size=4)
    files = [f"set/{i:03d}.png" for i in range(NUM_SAMPLES)]
    documents = [{"content": [c, {"image": file}]} for c, file in zip(captions, files, strict=True)]
    edits = [{"source": files[i], "instruction": captions[i], "target": files[i - 1]} for i in range(NUM_SAMPLES)]
    for name, lines in (("documents", documents), ("edits", edits)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    filesystem = pytest.importorskip("fsspec").filesystem("memory")
    filesystem.pipe("/set/a.tar", (tmp_path / "a.tar").read_bytes())
    yield {
        "folder": ("folder", str(tmp_path / "set")),
        "webdataset": ("webdataset", str(tmp_path / "a.tar")),
        "parquet": ("parquet", str(tmp_path / "a.parquet")),
        "interleaved": ("interleaved", str(tmp_path / "documents.jsonl")),
        "edits": ("interleaved", str(tmp_path / "edits.jsonl")),
        "remote": ("webdataset", "memory://set/a.tar"),
    }
    filesystem.store.clear()


class Storage:
    """Stands before `os.pread` and the remote file system: the calls whose numbers are in `failing` fail."""

    def __init__(self, monkeypatch, error=errno.EIO):
        self.failing = ()
        self.num_reads = 0
        self.error = error
        self._lock = threading.Lock()
        fsspec = pytest.importorskip("fsspec")
        monkeypatch.setattr(os, "pread", self._before(os.pread))
        memory = fsspec.filesystem("memory")
        monkeypatch.setattr(memory, "cat_file", self._before(memory.cat_file))

    def _before(self, read):
        def failing(*arguments, **options):
            with self._lock:
                number, self.num_reads = self.num_reads, self.num_reads + 1
            if number in self.failing:
                raise OSError(self.error, os.strerror(self.error))
            return read(*arguments, **options)

        return failing

    def fail(self, numbers):
        self.num_reads, self.failing = 0, numbers


@pytest.fixture
def storage(monkeypatch):
    return Storage(monkeypatch)


@pytest.fixture
def make(tokenizer, monkeypatch, stored):
    def make(kind, **options):
        source = load_source(SourceConfig(*stored[kind]), 8)
        return packed_loader(
            tokenizer, [source], monkeypatch, num_workers=0, cache_megabytes=0, sequences_per_step=2, **options
        )

    return make


NUM_STEPS = 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_that_fails_once_or_twice_changes_nothing(make, storage, kind):
    expected = contents(read(make(kind), NUM_STEPS))
    assert not any(damaged for *_, damaged in expected)
    storage.fail(())
    read(make(kind), NUM_STEPS)
    num_reads = storage.num_reads
    assert num_reads > 1
    for number in sorted({0, 1, num_reads // 2, num_reads - 1, *range(2, num_reads, 17)}):
        for failing in ({number}, {number, number + 1}):
            storage.fail(failing)
            assert contents(read(make(kind), NUM_STEPS)) == expected, (number, failing)


@pytest.mark.parametrize("kind", KINDS)
def test_every_third_read_may_fail(make, storage, kind):
    expected = contents(read(make(kind), NUM_STEPS))
    storage.fail(range(0, 10**6, 3))
    assert contents(read(make(kind), NUM_STEPS)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_that_goes_on_failing_stops_and_names_the_file(make, stored, storage, kind):
    expected = read(make(kind), NUM_STEPS)
    storage.fail(())
    loader = make(kind)
    at_open = storage.num_reads
    read(loader, NUM_STEPS)
    name = "/set/" if kind in ("folder", "interleaved", "edits") else os.path.basename(stored[kind][1])
    for number in sorted({0, at_open, (at_open + storage.num_reads) // 2, storage.num_reads - 1}):
        storage.fail(range(number, number + 3))
        steps = []
        with pytest.raises(StorageError, match=r"cannot read .*Input/output error") as caught:  # noqa: PT012
            for step in make(kind).steps(LoaderState(), NUM_STEPS):
                steps.append(step)
        assert name in str(caught.value) or ".jsonl" in str(caught.value)
        state = steps[-1].state if steps else LoaderState()
        storage.fail(())
        steps += read(make(kind), NUM_STEPS - len(steps), state)  # the same command again
        assert contents(steps) == contents(expected)


@pytest.mark.parametrize(
    "error", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT, errno.ENOMEM, errno.EACCES, errno.EAGAIN]
)
def test_what_is_no_damage(make, monkeypatch, error):
    loader = make("folder")
    Storage(monkeypatch, error).fail(range(10**6))
    with pytest.raises(StorageError, match=r"cannot read .*\.txt: " + os.strerror(error)):
        read(loader, 1)


def test_what_is_asked_three_times_and_what_once(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    for error, num_reads in ((errno.EIO, 3), (errno.EACCES, 1)):
        storage = Storage(monkeypatch, error)
        storage.fail(range(9))
        with pytest.raises(StorageError):
            load_image_file(tmp_path / "a.png")
        assert storage.num_reads == num_reads
        monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        load_image_file(tmp_path / "gone.png")
    with pytest.raises(NotADirectoryError):
        load_image_file(tmp_path / "a.png" / "b.png")


def test_a_read_that_gives_less_goes_on(stored, monkeypatch):
    whole = [
        np.asarray(load_source(SourceConfig(*stored[kind]), 8)[3].load_image()) for kind in ("folder", "webdataset")
    ]
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, start: pread(file, min(length, 7), start))
    for kind, expected in zip(("folder", "webdataset"), whole, strict=True):
        assert np.array_equal(np.asarray(load_source(SourceConfig(*stored[kind]), 8)[3].load_image()), expected)


def test_files_that_go_or_shrink_while_they_are_used(make, stored, tmp_path):
    loaders = {kind: make(kind) for kind in ("folder", "webdataset")}
    os.truncate(tmp_path / "a.tar", 20_000)
    with pytest.raises(StorageError, match=r"a\.tar must not become shorter while it is read"):
        read(loaders["webdataset"], NUM_STEPS)
    os.unlink(tmp_path / "set" / "005.txt")
    with pytest.raises(StorageError, match=r"005\.txt is gone"):
        read(loaders["folder"], NUM_STEPS)
    os.unlink(tmp_path / "a.tar")
    with pytest.raises(StorageError, match=r"a\.tar is gone"):
        read(loaders["webdataset"], NUM_STEPS)


def test_a_folder_that_cannot_be_listed(stored, tmp_path, monkeypatch):
    (tmp_path / "set" / "deep").mkdir()
    scandir, calls = os.scandir, []

    def failing(path):
        if str(path).endswith("deep"):
            calls.append(path)
            if len(calls) != 3:
                raise OSError(errno.EIO, "Input/output error")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    assert len(load_source(SourceConfig(*stored["folder"]), 8)) == NUM_SAMPLES and len(calls) == 3
    with pytest.raises(StorageError, match=r"cannot read .*deep: Input/output error"):
        load_source(SourceConfig(*stored["folder"]), 8)


# Others that read


def test_encoding_stops_and_goes_on(stored, storage, tokenizer, tmp_path):
    codec = load_codec(CodecConfig(image_size=8, channels=1))

    def encode(name):
        options = EncodeOptions(shard_samples=16, num_workers=1)
        source = SourceConfig(*stored["folder"])
        return encode_source(source, tmp_path / name, codec=codec, tokenizer=tokenizer, options=options)

    expected = encode("whole")
    for number in (0, 31, 79):
        storage.fail(range(number, number + 9))
        with pytest.raises(StorageError, match="cannot read"):
            encode("cache")
    storage.fail(range(0, 1000, 3))
    assert encode("cache")["shards"] == expected["shards"]


def test_an_autoencoder_stops(stored, storage):
    def first():
        data = ImageDataConfig(sources=[SourceConfig(*stored["folder"])], num_workers=1)
        loader = ImageLoader(data, AutoencoderConfig(image_size=8, channels=1), seed=0)
        return list(loader.batches(0, 20, 4))

    expected = first()
    storage.fail({5, 6})
    assert all(np.array_equal(a.images, b.images) for a, b in zip(first(), expected, strict=True))
    storage.fail({5, 6, 7})
    with pytest.raises(StorageError, match="cannot read"):
        first()


def test_check_lists_what_cannot_be_read_and_goes_on(stored, storage, capsys):
    source = load_source(SourceConfig(*stored["folder"]), 8)
    storage.fail({4, 5, 6})
    found = read_all(source, "set", load_images=True, num_workers=1).damaged
    assert len(found) == 1 and "Input/output error" in found[0].reason
    storage.fail({4, 5, 6})
    assert main(["data", "check", "=".join(stored["folder"]), "--workers", "1"]) == 1
    assert "Input/output error" in capsys.readouterr().out
