"""Several ranks: agreement, training a sharded model as one process does, compiled layers, and placing a model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lmfusion.training.distributed import World, compile_layers, init_distributed, local_range, local_shard, parallelize
from tests.lmfusion.model.test_modeling import make_batch
from tests.lmfusion.training.sharded_model import CASES, batches, build, save_llms, whole

ALONE = World(0, 1, torch.device("cpu"))
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of LLMs for `build`."""
    folder = tmp_path_factory.mktemp("llms")
    save_llms(folder)
    return folder


@pytest.fixture(scope="module")
def two_ranks(folder):
    """What each of two processes measured."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.lmfusion.training.sharded_model", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


# The world


def test_sums_are_over_all_ranks(two_ranks):
    for rank in two_ranks:
        assert rank["world"] == {"size": 2, "sums": [1, 2**41, -2], "total": [2.0, 1.0]}


def test_a_process_alone_is_a_world_of_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with init_distributed("cpu") as found:
        assert (found.rank, found.size, found.device) == (0, 1, torch.device("cpu"))
        assert found.sum_integers([3, 4]) == [3, 4]
        assert found.sum_tensor(torch.ones(2)).tolist() == [1, 1]
        found.barrier()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("name", "value"), [("RANK", None), ("LOCAL_RANK", "x"), ("WORLD_SIZE", "-2")])
def test_an_incomplete_environment_is_named(monkeypatch, name, value):
    for key, number in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(key, number)
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} must be a number, got '.*torchrun"), init_distributed("cpu"):
        pass


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for key, number in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(key, number)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(ValueError, match=r"must have a GPU of its own, got 2 GPUs for process 3 .*--nproc-per-node"),
        init_distributed("cuda"),
    ):
        pass


# Sharding


@pytest.mark.parametrize("case", CASES)
def test_losses_and_every_gradient_are_those_of_one_process(two_ranks, case):
    for rank in two_ranks:
        found = rank[case]
        assert found["losses"] == pytest.approx(found["expected"], rel=1e-5)
        assert max(found["expected"]) > 1
        assert max(found["errors"].values()) < 1e-5, found["errors"]
        assert any(name.startswith("text.") for name in found["errors"]) == ("trained text" in case)


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_steps_with_generation_and_scoring_between_them_equal_those_of_one_process(two_ranks, dtype):
    for rank in two_ranks:
        found = rank[dtype]
        for expected, score in found["scores"]:
            assert score == pytest.approx(expected, rel=1e-5 if dtype == "torch.float32" else 1e-3)
        assert len({expected for expected, _ in found["scores"]}) == 4
        assert all(found["same drawings"]) and all(found["same texts"])
        assert found["states are the trained weights'"]
        assert set(found["dtypes"].values()) == {"torch.float32", dtype}
        assert {kind for name, kind in found["dtypes"].items() if name.startswith("text.")} == {dtype}


def test_each_rank_holds_half_of_all_weights_frozen_ones_too(two_ranks):
    for rank in two_ranks:
        found = rank["memory"]
        assert found["held"] <= 0.51 * found["bytes"]
        assert found["frozen held"] <= 0.51 * found["frozen"]


def test_shards_are_consecutive_rows_that_make_up_the_weight(two_ranks):
    first, second = (rank["parts"] for rank in two_ranks)
    for name, (begin, middle, size) in first.items():
        assert begin == 0 and second[name] == [middle, size, size]
    embedding = "text.embed_tokens.weight"
    assert (first[embedding], second[embedding]) == ([0, 130, 259], [130, 259, 259])


def test_an_unsharded_weight_is_one_shard(folder):
    model = build(folder, "deep")
    weight = model.text.embed_tokens.weight
    parallelize(model, ALONE, torch.float32)
    assert model.text.embed_tokens.weight is weight and local_shard(weight) is weight
    assert local_range(weight) == (0, 259, 259) and local_range(torch.tensor(3.0)) == (0, 1, 1)


# Compiled layers


def test_compiled_layers_of_a_sharded_model(two_ranks):
    for rank in two_ranks:
        for found, expected in rank["compiled"]["losses"]:
            assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        ("narrow image tower", "aot_eager"),
        ("trained text", "aot_eager"),
        pytest.param("narrow image tower", "inductor", marks=pytest.mark.slow),
    ],
)
def test_few_versions_are_compiled_for_batches_of_many_shapes(folder, monkeypatch, case, backend):
    alone, model = build(folder, case), build(folder, case)
    counter = CompileCounterWithBackend(backend)
    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_function(f, backend=counter, **options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_layers(model)
    micro_batches = batches(model.frozen_text)
    for batch in micro_batches + more_batches(model.frozen_text):
        for m in (alone, model):
            m.zero_grad()
            m(batch=batch).loss.backward()
        for (name, found), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
            if found.requires_grad:
                torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)
    with torch.no_grad():
        model(batch=micro_batches[0])
    assert 1 <= counter.frame_count <= 4
    assert not torch._dynamo.utils.counters["graph_break"]


def more_batches(frozen_text):
    captions = [tuple(tuple(range(3, 5 + size + i)) for i in range(1 + size % 3)) for size in range(8)]
    return [make_batch(ids, frozen_text, seed) for seed, ids in enumerate(captions)]


# Placing


@pytest.mark.parametrize("frozen_text", [True, False])
def test_placing_gives_what_casting_whole_towers_gives(folder, frozen_text):
    case = "deep" if frozen_text else "trained text"
    expected, model = (build(folder, case, torch.bfloat16) for _ in range(2))
    parameters = dict(model.named_parameters())
    whole(expected, torch.bfloat16)
    parallelize(model, ALONE, torch.bfloat16)
    assert model.compute_dtype == torch.bfloat16
    for (name, found), weight in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert found is parameters[name] and found.dtype == weight.dtype and torch.equal(found, weight), name
    batch = batches(frozen_text)[0]
    assert model(batch=batch).loss.item() == expected(batch=batch).loss.item()
