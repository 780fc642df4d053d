"""The benchmarks compare results before timing, count what a call does, and record what cannot run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.baselines.both_towers import both_towers
from benchmarks.baselines.cosmos3 import cosmos3
from benchmarks.baselines.dense_llama import dense_llama
from benchmarks.baselines.gather_scatter import gather_scatter
from benchmarks.baselines.sdpa import WAYS, expanded
from benchmarks.baselines.slabs import slabs
from benchmarks.harness import counting, machine, shapes
from benchmarks.harness.compare import Contestant, Row, UnavailableError, compare, difference
from benchmarks.harness.layer import contestant, layer_flops, make_case, routed_block
from benchmarks.harness.output import launches_of, read_results, table, write_results
from lmfusion_kernels import TokenLayout, hybrid_attention

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
DOCUMENTS = [[("text", 5), ("image", 9), ("text", 3)], [("text", 2), ("image", 4)]]


@pytest.fixture
def quick(monkeypatch):
    """Ceilings of one thousandth of the size, and few rounds."""
    monkeypatch.setattr(machine, "CPU_COPY_BYTES", 2**16)
    monkeypatch.setattr(machine, "CPU_MATMUL_SIZE", 64)
    for function in (machine.copy_gigabytes_per_second, machine.matmul_teraflops):
        function.cache_clear()
    monkeypatch.setattr("benchmarks.harness.compare.SECONDS_PER_ROW", {"cpu": 0.005})
    yield
    for function in (machine.copy_gigabytes_per_second, machine.matmul_teraflops):
        function.cache_clear()


def doubled(seed):
    torch.manual_seed(seed)
    x = torch.randn(100)
    return lambda: x * 2


def missing(seed):
    raise UnavailableError("pip install it")


def crashing(seed):
    raise RuntimeError("out of\nluck")


def wrong(seed):
    call = doubled(seed)
    return lambda: call() * 1.1


def test_row_end_to_end(quick, tmp_path):
    row = Row("double", "tiny", torch.float32, "forward", "none", 100, num_bytes=800, bars={"same": 1000.0})
    contestants = {
        "ours": Contestant(doubled, mask=lambda: None),
        "same": Contestant(lambda seed: lambda: doubled(seed)() + 0),
        "missing": Contestant(missing),
        "crashing": Contestant(crashing),
        "wrong": Contestant(wrong),
        "floor": Contestant(wrong, is_floor=True),
    }
    result = compare(row, contestants, "ours", CPU)
    lines = result["contestants"]
    assert {name: line["status"] for name, line in lines.items()} == {
        "ours": "measured", "same": "measured", "missing": "skipped", "crashing": "failed", "wrong": "failed",
        "floor": "measured",
    }  # fmt: skip
    assert lines["missing"]["reason"] == "pip install it" and lines["crashing"]["reason"] == "RuntimeError: out of luck"
    assert "differs from ours by 0.1 of its norm" in lines["wrong"]["reason"]
    ours, same = lines["ours"], lines["same"]
    assert ours["ops"] == 1 and same["ops"] > 1 and ours["syncs"] == 0 and ours["mask_ms"] >= 0
    assert same["ratio"] == pytest.approx(ours["median_ms"] / same["median_ms"])
    assert ours["gb_s"] == pytest.approx(800 / (ours["median_ms"] / 1e3) / 1e9) and ours["share_of_ceiling"] > 0
    assert result["buffer_sets"] == 12  # 800 bytes never fill a cache

    results = machine.describe(CPU) | {"ceilings": machine.ceilings(CPU, [torch.float32]), "wall_s": 1.0}
    results["rows"] = [{"name": "test_double", **result}]
    path = write_results(results, tmp_path / "new")
    assert read_results(path)["rows"][0]["contestants"].keys() == contestants.keys()
    text = table(read_results(path))
    assert "skipped: pip install it" in text and "1000.00 met" in text and "GB/s" in text


def test_a_row_without_ours_is_a_failed_row(quick):
    row = Row("double", "", torch.float32, "forward", "none", 1, flops=1.0)
    result = compare(row, {"ours": Contestant(crashing), "other": Contestant(doubled)}, "ours", CPU)
    assert result["status"] == "failed" and "out of luck" in result["reason"]
    assert result["contestants"]["other"]["status"] == "measured" and "ratio" not in result["contestants"]["other"]


def test_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"benchmarks": []}))
    with pytest.raises(ValueError, match="must be a results file of schema 1"):
        read_results(path)
    path.write_text("no json")
    with pytest.raises(ValueError, match="must be a JSON file"):
        read_results(path)


@pytest.mark.parametrize("factor", [1.1, float("nan"), float("inf")])
def test_difference_sees_what_is_wrong(factor):
    x = torch.randn(50)
    assert not difference([x], [x + 1e-5], torch.float32)
    assert difference([x * factor], [x], torch.float32)
    assert "shape" in difference([x[:3]], [x], torch.float32) and difference([], [x], torch.float32)


def test_ops_and_syncs_are_counted():
    x = torch.randn(8, 8)

    def call():
        y = x.t()[:4].unflatten(0, (2, 2))  # views
        z = torch.empty(3)  # an allocation
        z = x[x[0] > 0] + y.sum()  # gt, index with a mask, sum, add
        return z.sum().item()  # sum, item

    counts = counting.count(call, CPU, is_compiled=False)
    assert counts.ops == 6 and counts.syncs == 2
    assert counting.count(call, CPU, is_compiled=True) == counting.Counts()


def test_events_of_a_profile_are_told_apart():
    events = [("cudaLaunchKernel", False), ("aten::mm", False), ("cudaStreamSynchronize", False), ("gemm", True),
              ("Memcpy DtoH (Device -> Pageable)", True), ("Memset (Device)", True), ("swiglu", True)]  # fmt: skip
    assert counting.tally(events) == (2, 2, 1)


def test_kernels_side_by_side_are_busy_once():
    assert counting.covered([]) == 0
    assert counting.covered([(5, 7), (0, 2), (1, 3), (1.5, 2), (6, 6.5)]) == 5
    line = {"kernels": 9, "syncs": 2, "busy_share": 0.874}
    assert launches_of(line) == "9 + 2 syncs, 87 % busy" and launches_of({"ops": 9, "syncs": 0}) == "9"


@pytest.mark.parametrize("make", [lambda c: slabs(c, is_compiled=False), gather_scatter, both_towers])
@pytest.mark.parametrize("frozen_text", [True, False])
@pytest.mark.parametrize("shape", [shapes.TINY, shapes.with_qk_norm(shapes.TINY)], ids=["plain", "QK norm"])
def test_baselines_compute_the_same_layer(make, frozen_text, shape):
    case = make_case(shape, DOCUMENTS, torch.float32, CPU, frozen_text)
    ours = contestant(case, routed_block, backward=True)
    theirs = contestant(case, make, backward=True)
    assert not difference(
        theirs.results(theirs.prepare(1)()), ours.results(ours.prepare(1)()), torch.float32
    )  # the same seed gives the same rows
    assert difference(theirs.results(theirs.prepare(2)()), ours.results(ours.prepare(1)()), torch.float32)


def test_cosmos3_computes_the_same_layer():
    pytest.importorskip("diffusers", reason="pip install diffusers")
    case = make_case(shapes.with_qk_norm(shapes.TINY), [[("text", 6), ("image", 7)]], torch.float32, CPU, True)
    ours = contestant(case, routed_block, backward=True)
    theirs = contestant(case, cosmos3, backward=True)
    assert not difference(theirs.results(theirs.prepare(1)()), ours.results(ours.prepare(1)()), torch.float32)


def test_dense_llama_is_checked_before_it_is_a_floor(monkeypatch):
    case = make_case(shapes.TINY, DOCUMENTS, torch.float32, CPU, frozen_text=True)
    rows = torch.cat(case.rows(0))
    assert dense_llama(case).forward(rows).shape == rows.shape
    case.text.down_proj.mul_(2)
    stale = case.text.down_proj / 2
    monkeypatch.setattr("lmfusion_kernels.reference.swiglu", lambda gate_up: gate_up.chunk(2, -1)[0] * stale.mean())
    with pytest.raises(ArithmeticError, match="on one text document"):
        dense_llama(case)


@pytest.mark.parametrize("way", ["mask", "spans"])
def test_sdpa_ways_are_exact(way):
    layout = TokenLayout.from_spans(DOCUMENTS)
    q, k, v = (torch.randn(layout.num_tokens, heads, 16) for heads in (4, 2, 2))
    out = WAYS[way](DOCUMENTS, layout)(*(expanded(x, 4) for x in (q, k, v)))
    torch.testing.assert_close(out[0].transpose(0, 1), hybrid_attention(q, k, v, layout), rtol=1e-4, atol=1e-5)
    with pytest.raises(UnavailableError, match="one text document"):
        WAYS["causal"](DOCUMENTS, layout)


def test_frozen_text_needs_fewer_flops():
    trained, is_frozen = (make_case(shapes.TINY, DOCUMENTS, torch.float32, CPU, frozen) for frozen in (False, True))
    forward = layer_flops(trained, backward=False)
    assert layer_flops(trained, backward=True) > layer_flops(is_frozen, backward=True) > forward
    assert forward == layer_flops(is_frozen, backward=False)


def test_every_pattern_has_the_tokens_it_says():
    for pattern in shapes.PATTERNS.values():
        for tokens in (256, 1024, 8192):
            assert sum(length for document in pattern(tokens) for _, length in document) == tokens
    for percent in shapes.TEXT_SHARES:
        layout = TokenLayout.from_spans(shapes.share_of_text(1024, percent))
        assert layout.num_tokens == 1024 and layout.num_text == 1024 * percent // 100


@pytest.mark.slow
def test_a_run_writes_results_and_table(tmp_path):
    """The rows of peers: without checkouts they only say how to get them, which is quick."""
    command = [sys.executable, "-m", "pytest", "benchmarks/cases/test_peers.py", "--benchmark-only", "-q", "-k",
               "forward and fp32", "-p", "no:cacheprovider"]  # fmt: skip
    environment = {"PATH": "/usr/bin:/bin", "LMFUSION_BENCHMARK_OUTPUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stdout + process.stderr
    (row,) = read_results(tmp_path / "results.json")["rows"]
    assert row["status"] == "measured" and row["contestants"]["ours"]["median_ms"] > 0
    assert "git clone" in row["contestants"]["BAGEL"]["reason"] and "skipped: git clone" in process.stdout
