"""Checkpoints are complete or absent, readable by any number of ranks, and damage is named."""

import errno
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lmfusion.training import checkpoint
from lmfusion.training.checkpoint import (
    CheckpointWriter,
    Slice,
    checkpoint_path,
    latest_step,
    list_steps,
    load_checkpoint,
    ranges,
    restore,
)
from lmfusion.training.distributed import World
from tests.lmfusion.training.runs import set_format

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


class ThreadWorld(World):
    """One of several ranks that are threads of this process."""

    @classmethod
    def of(cls, size):
        worlds = [cls(rank, size, CPU) for rank in range(size)]
        shared = threading.Barrier(size, timeout=30), [None] * size
        for world in worlds:
            world.__dict__["shared"] = shared
        return worlds

    def sum_integers(self, values):
        barrier, given = self.__dict__["shared"]
        given[self.rank] = list(values)
        barrier.wait()
        sums = [sum(column) for column in zip(*given, strict=True)]
        barrier.wait()
        return sums


def on_ranks(size, function):
    """Results of `function(world)` on each of `size` ranks, or the exceptions."""
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(function, world) for world in ThreadWorld.of(size)]
        return [future.exception() or future.result() for future in futures]


def rows_of(tensor, rank, size):
    """The rows that FSDP2 gives to a rank."""
    num_rows = tensor.shape[0] if tensor.dim() else 1
    if not tensor.dim():
        return Slice(tensor, (0, 1, 1))
    length = -(-num_rows // size)
    first, end = min(rank * length, num_rows), min((rank + 1) * length, num_rows)
    return Slice(tensor[first:end], (first, end, num_rows))


def save(folder, step, keep_last=2, world=ALONE):
    parts = {
        "weights": {"a": torch.full((3,), float(step)), "b": torch.ones(2, 2)[:, :1]},
        "ema": {"a": torch.full((3,), step / 2)},
    }
    writer = CheckpointWriter(folder, keep_last, world)
    writer.save(step, parts, {"note": [0.1, None]})
    writer.finish()
    return checkpoint_path(folder, step)


def test_round_trip(tmp_path):
    path = save(tmp_path, 7)
    parts, state = load_checkpoint(path)
    assert parts["weights"]["a"].tolist() == [7, 7, 7] and parts["weights"]["b"].shape == (2, 1)
    assert state == {"step": 7, "note": [0.1, None]}
    assert set(parts) == {"weights", "ema"}


def test_every_dtype_and_shape(tmp_path):
    torch.manual_seed(0)
    drawn = 100 * torch.randn(5, 3)
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
    tensors = {str(dtype): drawn.abs().to(dtype) for dtype in (*dtypes, torch.bool)}
    tensors |= {"none": torch.tensor(2.5), "no rows": torch.zeros(0, 4), "turned": drawn.T, "one": torch.ones(1)}
    writer = CheckpointWriter(tmp_path, 1, ALONE)
    writer.save(1, {"weights": tensors}, {})
    writer.finish()
    path = checkpoint_path(tmp_path, 1)
    for loaded in (load_checkpoint(path)[0]["weights"], load_file(path / "weights.00000-of-00001.safetensors")):
        assert set(loaded) == set(tensors)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


def test_only_the_last_are_kept(tmp_path):
    for step in (5, 10, 15, 100000000):
        save(tmp_path, step)
    assert list_steps(tmp_path) == [15, 100000000]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000015", "step-100000000"]
    assert list_steps(tmp_path / "nowhere") == [] and latest_step(tmp_path / "nowhere", ALONE) is None


def test_all_ranks_resume_from_what_rank_0_sees(tmp_path):
    """A shared file system may show another rank an older state."""
    save(tmp_path / "0", 0)
    assert latest_step(tmp_path / "0", ALONE) == 0
    assert on_ranks(2, lambda world: latest_step(tmp_path / str(world.rank), world)) == [0, 0]
    save(tmp_path / "1", 7)
    assert on_ranks(2, lambda world: latest_step(tmp_path / str(world.rank), world)) == [0, 0]


def test_older_checkpoints_are_deleted_only_after_the_new_one_is_in_place(tmp_path, monkeypatch):
    save(tmp_path, 1, keep_last=1)
    seen = []
    real = shutil.rmtree

    def rmtree(path, **options):
        seen.append((path.name, list_steps(tmp_path)))
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    save(tmp_path, 2, keep_last=1)
    assert seen == [("step-00000001.tmp", [2])], "by its name, an old one is whole or gone"
    assert list_steps(tmp_path) == [2]


def test_a_complete_checkpoint_is_not_rewritten(tmp_path):
    before = (save(tmp_path, 3) / checkpoint.MANIFEST).stat().st_mtime_ns
    assert (save(tmp_path, 3) / checkpoint.MANIFEST).stat().st_mtime_ns == before


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The weights and the caller's state change meanwhile; the checkpoint has their earlier values."""
    go_on = threading.Event()
    real = checkpoint._write_tensors
    monkeypatch.setattr(checkpoint, "_write_tensors", lambda *a: go_on.wait(30) and real(*a))
    weights, state = {"a": torch.arange(1000.0), "b": torch.ones(())}, {"gathered": [1]}
    before = {name: weight.clone() for name, weight in weights.items()}
    writer = CheckpointWriter(tmp_path, 1, ALONE)
    writer.save(5, {"weights": weights}, state)
    for _ in range(3):  # steps
        for weight in weights.values():
            weight.add_(1)
        state["gathered"].append(2)
        writer.poll()
        assert list_steps(tmp_path) == []
    go_on.set()
    deadline = time.monotonic() + 30
    while not list_steps(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.001)
        writer.poll()
    parts, saved_state = load_checkpoint(checkpoint_path(tmp_path, 5))
    assert saved_state == {"gathered": [1], "step": 5}
    assert all(torch.equal(parts["weights"][name], before[name]) for name in weights)


def test_a_checkpoint_waits_for_the_one_before(tmp_path, monkeypatch):
    real = checkpoint._write_tensors
    monkeypatch.setattr(checkpoint, "_write_tensors", lambda *a: (time.sleep(0.05), real(*a))[1])
    writer = CheckpointWriter(tmp_path, 5, ALONE)
    for step in range(4):
        writer.save(step, {"weights": {"a": torch.tensor([float(step)])}}, {})
        assert list_steps(tmp_path) == list(range(step))
    writer.finish()
    for step in range(4):
        assert load_checkpoint(checkpoint_path(tmp_path, step))[0]["weights"]["a"].tolist() == [step]


@pytest.mark.parametrize("failing", ["weights", "ema", "state.json", "rank-0.json", "manifest.json"])
def test_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, failing):
    save(tmp_path, 1)
    real = checkpoint._write

    def write(path, contents):
        if path.name.startswith(failing):
            path.write_bytes(b"half a fi")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, contents)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", write)
        with pytest.raises(
            OSError, match=r"cannot write .*step-00000002: .*No space left.*step 1 is intact\. Make room"
        ):
            save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert load_checkpoint(checkpoint_path(tmp_path, 1))[1]["step"] == 1
    save(tmp_path, 2)
    assert list_steps(tmp_path) == [1, 2]


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    save(tmp_path, 1, keep_last=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda path, **_: (_ for _ in ()).throw(OSError("busy")))
        save(tmp_path, 2, keep_last=1)
    assert "cannot delete the old checkpoint" in capsys.readouterr().err
    save(tmp_path, 3, keep_last=1)
    assert list_steps(tmp_path) == [3]


def test_a_disk_that_loses_what_is_written_is_detected(tmp_path, monkeypatch):
    real = checkpoint._write

    def write(path, contents):
        written = real(path, contents)
        if path.name.startswith("ema"):
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        return written

    monkeypatch.setattr(checkpoint, "_write", write)
    with pytest.raises(OSError, match=r"ema.* does not read back as it was written.*there is no earlier one"):
        save(tmp_path, 1)
    assert list_steps(tmp_path) == []


def test_leftovers_of_killed_runs_are_removed(tmp_path):
    path = save(tmp_path, 1)
    shutil.copytree(path, path.with_name("step-00000002.tmp"))
    (tmp_path / "step-00000003.tmp").mkdir()
    (tmp_path / "step-00000003.tmp" / "weights.00000-of-00009.safetensors").write_bytes(b"half")
    assert list_steps(tmp_path) == [1]
    save(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]
    assert len(list(checkpoint_path(tmp_path, 3).iterdir())) == 4


@settings(max_examples=25, deadline=None)
@given(
    num_writers=st.integers(1, 6),
    num_readers=st.integers(1, 6),
    num_rows=st.lists(st.integers(0, 11), min_size=1, max_size=4),
)
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path_factory, num_writers, num_readers, num_rows):
    folder = tmp_path_factory.mktemp("ranks")
    whole = {str(i): torch.randn(n, i + 1) for i, n in enumerate(num_rows)} | {"step": torch.tensor(3.0)}

    def write(world):
        parts = {"weights": {name: rows_of(tensor, world.rank, world.size) for name, tensor in whole.items()}}
        writer = CheckpointWriter(folder, 1, world)
        writer.save(9, parts, {"of": "rank 0"})
        writer.finish()

    assert on_ranks(num_writers, write) == [None] * num_writers
    for rank in range(num_readers):
        wanted = {"weights": {name: rows_of(tensor, rank, num_readers) for name, tensor in whole.items()}}
        parts, state = load_checkpoint(checkpoint_path(folder, 9), ranges(wanted))
        assert state == {"of": "rank 0", "step": 9}
        for name, expected in wanted["weights"].items():
            assert torch.equal(parts["weights"][name], expected.rows), name
    complete, _ = load_checkpoint(checkpoint_path(folder, 9))
    assert all(torch.equal(complete["weights"][name], tensor) for name, tensor in whole.items() if tensor.numel())


def save_on_ranks(folder, size, step=1):
    def write(world):
        writer = CheckpointWriter(folder, 2, world)
        writer.save(step, {"weights": {"a": rows_of(torch.arange(8.0) + step, world.rank, size)}}, {})
        writer.finish()

    return on_ranks(size, write)


def test_full_disk_on_one_rank_stops_all_and_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    assert save_on_ranks(tmp_path, 3) == [None] * 3
    real = checkpoint._write

    def write(path, contents):
        if path.name.startswith("weights.00001"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, contents)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", write)
        first, second, third = save_on_ranks(tmp_path, 3, step=2)
    assert "No space left on device; the checkpoint of step 1 is intact" in str(second)
    for error in (first, third):
        assert isinstance(error, OSError) and "1 of 3 ranks failed, each gives its reason" in str(error)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert save_on_ranks(tmp_path, 3, step=2) == [None] * 3


def test_complete_only_when_the_slowest_rank_has_written(tmp_path, monkeypatch):
    go_on = threading.Event()
    real = checkpoint._write_tensors

    def write_tensors(path, tensors):
        assert not path.name.startswith("weights.00001") or go_on.wait(30)
        return real(path, tensors)

    monkeypatch.setattr(checkpoint, "_write_tensors", write_tensors)

    def train(world):
        writer = CheckpointWriter(tmp_path, 2, world)
        writer.save(1, {"weights": {"a": rows_of(torch.arange(8.0), world.rank, 2)}}, {})
        found = []
        for _ in range(3):
            time.sleep(0.02)
            writer.poll()
            found.append(list_steps(tmp_path))
        world.barrier()
        go_on.set()
        writer.finish()
        return [*found, list_steps(tmp_path)]

    assert on_ranks(2, train) == [[[], [], [], [1]]] * 2


def test_ranks_without_a_shared_folder_are_refused(tmp_path):
    def write(world):
        folder = tmp_path / str(world.rank)
        writer = CheckpointWriter(folder, 2, world)
        writer.save(1, {"weights": {"a": rows_of(torch.arange(8.0), world.rank, 2)}}, {})
        writer.finish()

    for error in on_ranks(2, write):
        assert isinstance(error, OSError)
    assert "all ranks must write to one shared folder; rank 0 does not see that of rank 1" in str(on_ranks(2, write)[0])


def test_each_rank_checks_the_files_it_reads_and_all_check_for_missing_ones(tmp_path):
    save_on_ranks(tmp_path, 2)
    path = checkpoint_path(tmp_path, 1)
    file = path / "weights.00000-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for wanted in ((0, 4, 8), (0, 8, 8), (3, 5, 8)):
        with pytest.raises(ValueError, match=r"weights\.00000-of-00002\.safetensors is damaged"):
            load_checkpoint(path, {"weights": {"a": wanted}})
    parts, _ = load_checkpoint(path, {"weights": {"a": (4, 8, 8)}})
    assert parts["weights"]["a"].tolist() == [5, 6, 7, 8]
    file.unlink()
    with pytest.raises(ValueError, match=r"weights\.00000-of-00002\.safetensors is damaged or missing"):
        load_checkpoint(path, {"weights": {"a": (4, 8, 8)}})


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            {"weights": {"c": (0, 1, 1)}},
            "must hold 1 rows of weights/c, got none: it belongs to another model or optimizer; change these",
        ),
        ({"adam": {"a": (0, 3, 3)}}, "must hold 3 rows of adam/a, got none"),
        (
            {"weights": {"a": (0, 4, 4)}},
            "must hold 4 rows of weights/a, got 3 rows: it belongs to another model or optimizer",
        ),
    ],
)
def test_tensors_of_another_model_are_named(tmp_path, wanted, message):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(save(tmp_path, 1), wanted)


def test_rows_are_restored_in_place_or_refused(tmp_path):
    parts, _ = load_checkpoint(save(tmp_path, 4))
    weights = {"a": torch.nn.Parameter(torch.zeros(3)), "b": Slice(torch.zeros(2, 1), (0, 2, 2))}
    restore(weights, parts["weights"])
    assert weights["a"].tolist() == [4, 4, 4] and weights["b"].rows.tolist() == [[1], [1]]
    for other in (torch.zeros(2, 5), torch.zeros(2, 1, dtype=torch.float64)):
        with pytest.raises(
            ValueError, match=r"b must be torch.float.* as in the model, got torch.float32 \[2, 1\] in the checkpoint"
        ):
            restore({"b": other}, parts["weights"])


def test_rows_that_no_rank_wrote_are_an_error(tmp_path):
    writer = CheckpointWriter(tmp_path, 1, ALONE)
    writer.save(1, {"weights": {"a": Slice(torch.arange(4.0), (2, 6, 8))}}, {})
    writer.finish()
    path = checkpoint_path(tmp_path, 1)
    assert load_checkpoint(path, {"weights": {"a": (3, 6, 8)}})[0]["weights"]["a"].tolist() == [1, 2, 3]
    for wanted in ((0, 8, 8), (0, 4, 8), (4, 8, 8), (0, 2, 8), (7, 8, 8), (8, 8, 8)):
        with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
            load_checkpoint(path, {"weights": {"a": wanted}})


def test_another_format_is_refused(tmp_path):
    path = save(tmp_path, 4)
    set_format(path, 2)
    with pytest.raises(ValueError, match=r"must have format 3, got 2, of another version of lmfusion; start a new run"):
        load_checkpoint(path)


def damages(path):
    """(name, damage) for many kinds of damage to a file of the checkpoint at `path`."""
    other = path.with_name("step-00000003")
    for file in sorted(path.iterdir()):
        size = file.stat().st_size
        data = file.read_bytes()

        def write(content, file=file):
            return lambda: file.write_bytes(content)

        for at in sorted({0, 1, 7, 8, 9, size // 4, size // 3, size // 2, size - 2, size - 1}):
            for bit in (1, 0x80):
                if not (file.suffix == ".json" and chr(data[at]).isspace()):
                    flipped = bytes([*data[:at], data[at] ^ bit, *data[at + 1 :]])
                    yield f"{file.name}: bit {bit} of byte {at}", file, write(flipped)
        for length in (0, 1, 8, size // 2, size - 1):
            yield f"{file.name}: cut to {length}", file, write(data[:length])
        yield f"{file.name}: one byte more", file, write(data + b" x")
        yield f"{file.name}: zeros", file, write(bytes(size))
        yield f"{file.name}: deleted", file, file.unlink
        yield f"{file.name}: a folder", file, lambda file=file: (file.unlink(), file.mkdir())
        if file.name != "manifest.json":
            yield f"{file.name}: of another step", file, write((other / file.name).read_bytes())
    manifest = path / "manifest.json"
    values = json.loads(manifest.read_text())
    files = values["files"]
    weights, ema = (files[f"{part}.00000-of-00001.safetensors"] for part in ("weights", "ema"))
    for name, changed in {
        "a list": [values],
        "a number": 3,
        "nothing": None,
        "no files": {**values, "files": {}},
        "files only": {"format": 2, "files": files},
        "no sha256": {**values, "sha256": None},
        "fewer files": {**values, "files": dict(list(files.items())[1:])},
        "exchanged files": {**values, "files": dict(zip(files, reversed(files.values()), strict=True))},
        "other rows": {**values, "files": {**files, "ema": {**ema, "ranges": weights["ranges"]}}},
        "other sha256": {**values, "files": {**files, "ema": {**ema, "sha256": weights["sha256"]}}},
        "a path": {**values, "files": {**files, "../../secret": ema}},
    }.items():
        yield f"manifest: {name}", manifest, lambda changed=changed: manifest.write_text(json.dumps(changed))
    yield "manifest: deep", manifest, lambda: manifest.write_text("[" * 100_000)
    yield "manifest: no text", manifest, lambda: manifest.write_bytes(b"\xff\xfe\x00")


def test_damage_of_every_kind_is_named(tmp_path):
    whole = save(tmp_path / "whole", 4).parent
    save(whole, 3)
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    path = checkpoint_path(folder, 4)
    num_tried = 0
    for name, file, damage in damages(path):
        damage()
        assert list_steps(folder) == [3, 4], "one that is damaged is not passed over in silence"
        message = rf"{file.name} is damaged or missing; delete .*step-00000004|step-00000004 must have format"
        with pytest.raises(ValueError, match=message):
            print(name, load_checkpoint(path))
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        assert load_checkpoint(path)[0]["weights"]["a"].tolist() == [4, 4, 4]
        num_tried += 1
    assert num_tried > 100


def test_damage_after_the_files_were_checked_is_named(tmp_path):
    path = save(tmp_path, 4)
    parts, _ = load_checkpoint(path)
    (path / "ema.00000-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"ema\.00000-of-00001\.safetensors is damaged or missing"):
        parts["ema"]["a"]


def test_the_way_out_of_damage_is_the_checkpoint_before_or_the_beginning(tmp_path):
    for step, way_out in (
        (1, "to begin again, since there is no other"),
        (2, "to resume from the checkpoint before it"),
    ):
        path = save(tmp_path, step)
        (path / "state.json").write_text("")
        with pytest.raises(ValueError, match=rf"state\.json is damaged or missing; delete {path} {way_out}"):
            load_checkpoint(path)
