"""The performance page and the tables agree with the committed results, losses and failures included."""

import copy

import pytest

from benchmarks.harness import report
from benchmarks.harness.chart import Bar, Group, svg
from benchmarks.harness.output import file_name, write_results
from benchmarks.harness.summary import summary_page
from benchmarks.harness.tables import tables_page


def line(ms, **values):
    return {"status": "measured", "median_ms": ms, "iqr_ms": 0.1, "first_call_s": 0.1, "ops": 3, "syncs": 0,
            "bar": None, "is_floor": False, "tflop_s": 1 / ms, "share_of_ceiling": 0.5, **values}  # fmt: skip


def row(op, contestants, **values):
    return {"name": f"test_{op}", "op": op, "case": "a case", "dtype": "bfloat16", "direction": "forward",
            "shape": "SmolLM2-135M", "tokens": 1024, "ours": "ours", "status": "measured", "reason": None,
            "contestants": contestants, **values}  # fmt: skip


@pytest.fixture
def results():
    lines = {
        "ours": line(2.0, least={"share_of_ceiling": 0.9}),
        "slower": line(4.0, ratio=0.5, bar=0.6),
        "quicker": line(1.0, ratio=2.0, bar=0.9),
        "ours, otherwise": line(1.5, ratio=1.33),
        "floor": line(0.5, ratio=4.0, is_floor=True),
        "absent": {"status": "skipped", "reason": "pip install a|b", "bar": None},
        "broken": {"status": "failed", "reason": "out of memory", "bar": 0.5},
    }
    failed = row("swiglu", {"ours": {"status": "failed", "reason": "RuntimeError: no luck", "bar": None}},
                 name="test_swiglu[x]", status="failed", reason="RuntimeError: no luck")  # fmt: skip
    never = {"name": "test_decode[y]", "op": "decode", "status": "skipped", "reason": "no time", "contestants": {}}
    return {
        "schema": 1,
        "device": {"name": "A CPU", "type": "cpu", "capability": "AVX512", "threads": 2},
        "versions": {"torch": "2.13"},
        "commit": "abc",
        "date": "2026-01-02",
        "wall_s": 3.0,
        "ceilings": {"copy_gb_s": 10.0, "matmul_tflop_s": {"bfloat16": 1.0}},
        "rows": [row("routed_block", lines), failed, never],
    }


def test_committed_pages_are_up_to_date():
    pages = report.pages()
    assert {path: path.read_text() for path in report.written()} == pages, "run python -m benchmarks.harness.report"
    assert len(report.PAGE.read_text().splitlines()) <= 120


def summary(results):
    return summary_page([results], "images/", "tables/")


def test_pages_without_a_gpu_say_so(results):
    gpu = copy.deepcopy(results)
    gpu["device"] |= {"type": "cuda", "name": "A GPU", "capability": "9.0"}
    for page in (summary, lambda results: tables_page([results], "images/")[0]):
        assert "untested on a GPU" in page(results) and "## A CPU" in page(results)
        assert "untested" not in page(gpu) and "## A GPU" in page(gpu)


def test_tables_show_losses_bars_and_failures(results):
    text, plots = tables_page([results], "images/")
    losses = text.split("### Where we lose")[1].split("###")[0]
    assert "| quicker | 2 | 1 | 2.00 |" in losses
    assert "floor" not in losses and "slower" not in losses and "otherwise" not in losses
    assert "1 of 3 bars" in text and "| ours / quicker | 2.00 | 0.90 MISSED |" in text
    assert "| ours: share_of_ceiling | 0.5 | >= 0.9 MISSED |" in text
    missing = text.split("### Not measured")[1]
    assert (
        "`test_swiglu[x]` failed: RuntimeError: no luck" in missing and "`test_decode[y]` skipped: no time" in missing
    )
    assert "absent: skipped, pip install a/b" in text and "broken: failed, out of memory" in text
    (name,) = plots
    assert f"](images/{name})" in text and "quicker" in plots[name]


def test_summary_compares_with_the_strongest_rival(results):
    second = row("routed_block", {"ours": line(2.0), "slower": line(4.0, ratio=0.5)}, case="another case")
    results["rows"].append(second)
    text = summary(results)
    assert "faster than the strongest rival in 1 of 2 rows" in text
    assert "| Two-tower layer, bf16 forward | 1 of 2 | 0.50 | 1.25 | 2.00 | quicker / slower |" in text
    losses = text.split("### Where we lose")[1].split("###")[0]
    assert "| quicker | 2 | 1 | 2.00 |" in losses and "floor" not in losses and "another case" not in losses
    assert "1 of 3 bars" in text and "| ours / quicker | 2.00 | 0.90 MISSED |" in text
    (plot,) = tables_page([results], "")[1]
    assert f"(images/{plot})" in text and f"(tables/{file_name(results)[:-5]}.md)" in text


def test_pages_without_losses_say_so(results):
    del results["rows"][0]["contestants"]["quicker"]
    for text in (summary(results), tables_page([results], "")[0]):
        assert "No baseline of the same work was faster" in text


def test_bars_are_drawn_to_scale():
    drawing = svg(
        "t", [Group("g", [Bar("ours", 1.0, is_ours=True), Bar("<twice>", 2.0), Bar("half", 0.5), Bar("9", 9)])]
    )
    ours, twice, half, longest = (float(part.split("'")[0]) for part in drawing.split(" width='")[3:])
    assert twice == 2 * ours == 4 * half and longest == 4 * ours and "9.00 (cut)" in drawing
    assert "&lt;twice&gt;" in drawing and "2.00" in drawing


def test_a_kept_run_replaces_the_earlier_one_and_renews_the_pages(results, tmp_path, monkeypatch):
    for name in ("RESULTS", "PAGE", "IMAGES"):
        monkeypatch.setattr(report, name, tmp_path / name.lower())
    (tmp_path / "images").mkdir()
    old = {**results, "date": "2025-01-02"}
    for run in (old, results):
        path = write_results(run, tmp_path / "run")
        assert report.main(["--keep", str(path)]) == 0
    assert file_name(results) == "cpu-a-cpu-avx512-2026-01-02.json"
    assert {p.name for p in report.RESULTS.iterdir()} == {
        f"cpu-a-cpu-avx512-2026-01-02.{kind}" for kind in ("json", "md")
    }
    assert "## A CPU" in report.PAGE.read_text() and len(list(report.IMAGES.iterdir())) == 1
    assert report.main([str(path)]) == 0
    assert "2026-01-02" in (tmp_path / "run" / "results.md").read_text()
    with pytest.raises(SystemExit):
        report.main(["--keep"])
