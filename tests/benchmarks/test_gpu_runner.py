"""`make gpu` goes on after a failure, keeps its time limit, names what it left out, and exits with the right status."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import Command, Runner, Step
from benchmarks.harness import gpu_report
from lmfusion_kernels.attention import table

ROOT = Path(__file__).parents[2]


def python(name: str, code: str, **options: object) -> Command:
    return Command(name, [sys.executable, "-c", code], **options)


PASSES = python("fine", "print('all is well')")
FAILS = python("broken", "print('the reason'); raise SystemExit(3)")
SLEEPS = python("slow", "import time; print('started', flush=True); time.sleep(60)")


def statuses(runner: Runner) -> dict[str, str]:
    return {f"{outcome.step}/{outcome.name}": outcome.status for outcome in runner.outcomes}


def test_a_failure_stops_nothing_and_is_listed(tmp_path, capsys):
    runner = Runner(tmp_path)
    runner.run([Step("first", 20, [FAILS, PASSES]), Step("second", 20, [PASSES])])
    assert statuses(runner) == {"first/broken": "failed", "first/fine": "passed", "second/fine": "passed"}
    assert runner.finish() == 1
    shown = capsys.readouterr().out
    assert "FAILED: first/broken: failed; exit status 3" in shown
    assert "the reason" in shown
    assert "all is well" in (tmp_path / "logs.txt").read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["failed"]) == 1 and len(summary["commands"]) == 3


def test_everything_passed(tmp_path, capsys):
    runner = Runner(tmp_path)
    runner.run([Step("only", 20, [PASSES]), Step("other", 20, missing="no such tool")])
    assert runner.finish() == 0
    assert "not run: other/all: no such tool" in capsys.readouterr().out


@pytest.mark.parametrize(("found", "status"), [({"gpu": None}, 0), ({"gpu": "NVIDIA H200"}, 1)], ids=["no GPU", "GPU"])
def test_on_a_gpu_tests_have_to_run(tmp_path, found, status):
    runner = Runner(tmp_path)
    runner.found = found
    runner.run([Step("tests", 20, missing="python modules are missing: pytest"), Step("other", 20, missing="no tool")])
    assert runner.finish() == status


def test_a_tool_that_refuses_the_machine_is_skipped(tmp_path):
    refuses = python("memcheck", "print('Device not supported'); raise SystemExit(1)", refusal="Device not supported")
    finds = python("racecheck", "print('a race'); raise SystemExit(9)", refusal="Device not supported")
    runner = Runner(tmp_path)
    runner.found = {"gpu": "NVIDIA H200"}
    runner.run([Step("tests", 20, [refuses, PASSES])])
    assert statuses(runner) == {"tests/memcheck": "skipped", "tests/fine": "passed"}
    assert runner.finish() == 0
    runner.run([Step("tests", 20, [finds])])
    assert statuses(runner)["tests/racecheck"] == "failed"


def test_a_program_that_does_not_exist(tmp_path):
    runner = Runner(tmp_path)
    runner.run([Step("tool", 20, [Command("absent", ["/nowhere/tool"]), PASSES])])
    assert statuses(runner) == {"tool/absent": "failed", "tool/fine": "passed"}
    assert "does not start" in runner.outcomes[0].detail


def test_a_crash_is_named_by_its_signal(tmp_path):
    runner = Runner(tmp_path)
    runner.run([Step("crash", 20, [python("abort", "import os; os.abort()")])])
    assert runner.outcomes[0].detail == "killed by SIGABRT"


def test_a_step_out_of_time_is_interrupted_and_the_next_one_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 4.0)  # on a busy machine Python takes seconds to start and to end
    deaf = python("deaf", "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)")
    start = time.monotonic()
    runner = Runner(tmp_path)
    runner.run([Step("slow", 3.0, [SLEEPS, deaf, PASSES], jobs=2), Step("next", 20, [PASSES])])
    assert time.monotonic() - start < 30
    expected = {"slow/slow": "timed out", "slow/deaf": "timed out", "slow/fine": "timed out", "next/fine": "passed"}
    assert statuses(runner) == expected
    assert runner.finish() == 1
    assert "KeyboardInterrupt" in (tmp_path / "logs.txt").read_text()


def test_children_of_a_command_are_stopped_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    witness = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(2.5); pathlib.Path({str(witness)!r}).touch()"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    Runner(tmp_path / "out").run([Step("tree", 1.0, [python("parent", parent)])])
    time.sleep(2)
    assert not witness.exists()


def test_a_spent_budget_leaves_out_the_rest_but_not_what_has_a_reserve(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    runner = Runner(tmp_path, budget=12.0)
    steps = [Step("slow", 100, [SLEEPS]), Step("short", 100, [PASSES]), Step("kept", 100, [PASSES], reserve=11.0)]
    runner.run(steps)
    assert statuses(runner) == {"slow/slow": "timed out", "short/all": "timed out", "kept/fine": "passed"}
    assert "no time left of the budget" in runner.outcomes[1].detail


def test_an_optional_step_may_be_left_out(tmp_path):
    runner = Runner(tmp_path, budget=20.0)
    runner.run([Step("long", 100, [SLEEPS], is_optional=True), Step("short", 10, [PASSES], is_optional=True)])
    assert statuses(runner) == {"long/all": "skipped", "short/fine": "passed"}
    assert runner.finish() == 0


def test_commands_run_side_by_side(tmp_path):
    wait = "import time; time.sleep(1)"
    runner = Runner(tmp_path)
    start = time.monotonic()
    runner.run([Step("sleep", 60, [python(f"p{i}", wait) for i in range(4)], jobs=4)])
    assert time.monotonic() - start < 3.5
    assert set(statuses(runner).values()) == {"passed"}


def test_a_command_gets_its_time(tmp_path):
    """Benchmarks that know their time limit leave rows out with the reason; an interruption would be a failure."""
    command = python("benchmarks", "import os; print('has', os.environ['SECONDS'])", seconds_in="SECONDS")
    runner = Runner(tmp_path)
    runner.run([Step("long", 100, [command]), Step("short", 20, [command])])
    assert [outcome.log.strip() for outcome in runner.outcomes] == [f"has {100 - gpu.MARGIN:.0f}", "has 0"]


def test_results_of_pytest_are_read(tmp_path):
    test = tmp_path / "test_three.py"
    test.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "def test_elsewhere(): pytest.skip('no such device')\n"
    )
    junit = tmp_path / "three.xml"
    arguments = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", str(test)]
    runner = Runner(tmp_path / "out")
    runner.run([Step("tests", 60, [Command("three", arguments, junit=junit)])])
    (outcome,) = runner.outcomes
    assert outcome.status == "failed"
    assert outcome.tests == {"passed": 1, "failed": 1, "skipped": 1}
    assert outcome.skips == {"no such device": 1}
    assert "test_bad" in outcome.failures[0] and "one is not two" in outcome.failures[0]
    assert not junit.exists()


FOUND = {
    "python": "3.12", "torch": "2.11", "gpu": "NVIDIA H200", "capability": [9, 0],
    "modules": ["pytest", "hypothesis", "pytest_timeout", "xdist", "pytest_benchmark", "triton"],
}  # fmt: skip


def test_plan_with_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: "/opt/compute-sanitizer")
    monkeypatch.delenv("LMFUSION_CUDA_ARCHITECTURES", raising=False)
    steps = {step.name: step for step in gpu.make_plan("python3", FOUND, tmp_path)}
    assert not any(step.missing for step in steps.values())
    files = {path.name for path in ROOT.glob("tests/kernels/gpu/test_*.py")}
    assert {command.name for command in steps["tests"].commands} == files | {"memcheck", "racecheck"}
    assert steps["build"].commands[0].environment == {"LMFUSION_CUDA_ARCHITECTURES": "90a"}
    assert sum(step.reserve for step in steps.values()) < gpu.DEFAULT_BUDGET
    for step in steps.values():
        for command in step.commands:
            scripts = [argument for argument in command.arguments if argument.endswith(".py")]
            assert all((ROOT / script).exists() for script in scripts), command
            modules = [argument for argument in command.arguments if argument.startswith("benchmarks.")]
            assert all(importlib.util.find_spec(module) for module in modules), command


@pytest.mark.parametrize(
    ("change", "left_out"),
    [
        ({"gpu": None, "capability": None}, {"device", "tests", "compute-sanitizer", "tuning", "benchmarks"}),
        ({"modules": ["triton"]}, {"tests", "benchmarks"}),
        ({"torch": None, "gpu": None, "capability": None, "modules": []}, "all"),
    ],
    ids=["no GPU", "no modules", "no torch"],
)
def test_plan_where_something_is_missing(tmp_path, monkeypatch, change, left_out):
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: "/opt/compute-sanitizer")
    steps = gpu.make_plan("python3", FOUND | change, tmp_path)
    missing = {step.name for step in steps if step.missing}
    assert missing == ({step.name for step in steps} if left_out == "all" else left_out)
    assert all(step.missing or step.commands for step in steps)


def test_whole_run_without_a_gpu(tmp_path, monkeypatch):
    """The real program, with commands that do nothing instead of build, collection and benchmark."""
    monkeypatch.setattr(gpu, "probe", lambda python: FOUND | {"gpu": None, "capability": None})
    plan = gpu.make_plan

    def quick_plan(*arguments):
        return [dataclasses.replace(step, commands=[PASSES] if step.commands else []) for step in plan(*arguments)]

    monkeypatch.setattr(gpu, "make_plan", quick_plan)
    output = tmp_path / "out"
    assert gpu.main([str(output)]) == 0
    summary = json.loads((output / "summary.json").read_text())
    by_step = {command["step"]: command for command in summary["commands"]}
    assert by_step["build"]["status"] == "passed"
    assert by_step["benchmarks"]["status"] == "skipped"
    assert by_step["report"]["detail"] == "the benchmarks wrote no results.json"
    assert {path.name for path in output.iterdir()} <= set(gpu.FILES)


def test_counts_of_tests_are_added_to_the_results(tmp_path):
    (tmp_path / "results.json").write_text('{"schema": 1, "rows": []}')
    commands = [{"step": "tests", "name": "test_block.py", "status": "passed"}, {"step": "build", "status": "passed"}]
    gpu.add_tests(tmp_path, {"commands": commands})
    assert json.loads((tmp_path / "results.json").read_text())["tests"] == commands[:1]


def make_results(device, rows):
    facts = {"versions": {}, "commit": "abc", "date": "2026-01-01", "wall_s": 1.0}
    return {"schema": 1, "device": device, "ceilings": {"copy_gb_s": 1.0, "matmul_tflop_s": {}}, "rows": rows, **facts}


def attention_rows(medians):
    """A row for each direction; medians: by contestant, (forward, forward and backward) in ms."""
    for i, direction in enumerate(("forward", "forward+backward")):
        lines = {
            name: {"status": "measured", "median_ms": times[i], "iqr_ms": 0.1, "first_call_s": 0.1}
            for name, times in medians.items()
        }
        lines["flex"] = {"status": "skipped", "reason": "not here"}
        yield {
            "op": "hybrid_attention", "case": "causal", "dtype": "bfloat16", "shape": "LMFusion-8B", "tokens": 8192,
            "direction": direction, "status": "measured", "ours": "ours", "name": "row", "contestants": lines,
        }  # fmt: skip


def test_report_of_a_run(tmp_path):
    """Triton wins the forward, flash the sum; other contestants, and kernels that did not run, are not candidates."""
    medians = {"ours": (1.0, 5.0), "triton": (1.0, 5.0), "flash": (1.5, 4.0), "sdpa flash, causal": (0.1, 0.2)}
    device = {"name": "NVIDIA H200", "type": "cuda", "capability": "9.0"}
    rows = list(attention_rows(medians))
    results = make_results(device, [*rows, {**rows[0], "op": "swiglu"}])
    counts = {"passed": 3, "failed": 1}
    results["tests"] = [{"name": "test_block.py", "status": "failed", "tests": counts, "failures": ["one is not two"]}]
    results["tests"].append({"name": "memcheck", "status": "skipped", "detail": "no such tool"})
    (tmp_path / "results.json").write_text(json.dumps(results))
    gpu_report.main(str(tmp_path / "results.json"))

    proposed = {row.direction: row for row in table.parse((tmp_path / "attention_table.json").read_text())}
    assert (proposed["forward"].kernel, proposed["training"].kernel) == ("triton", "flash")
    assert proposed["forward"].head_dim == 128 and proposed["forward"].capability == "9.0"

    text = (tmp_path / "results.md").read_text()
    assert "| test_block.py | failed | 3 | 1 |" in text and "one is not two" in text and "no such tool |" in text
    assert text.count(".svg") == 1
    plots = ElementTree.parse(tmp_path / "plots.svg").getroot()
    inner = [child for child in plots if child.tag.endswith("svg")]
    assert len(inner) == 2
    bottom = int(inner[0].get("height"))
    assert int(inner[1].get("y")) >= bottom and int(plots.get("height")) >= bottom + int(inner[1].get("height"))
    assert {path.name for path in tmp_path.iterdir()} <= set(gpu.FILES)


def test_report_of_a_run_on_a_cpu_proposes_nothing(tmp_path):
    device = {"name": "a CPU", "type": "cpu", "capability": "AVX2"}
    (tmp_path / "results.json").write_text(json.dumps(make_results(device, list(attention_rows({"ours": (1, 2)})))))
    gpu_report.main(str(tmp_path / "results.json"))
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "plots.svg"}


def test_probe_says_what_is_there():
    found = gpu.probe(sys.executable)
    assert found["torch"] and "pytest" in found["modules"]
    assert gpu.probe("/nowhere/python")["torch"] is None


def test_needs_the_standard_library_alone(tmp_path):
    """The program starts with a python without torch, and says so."""
    environment = {**os.environ, "PYTHONPATH": ""}
    code = "import sys; sys.path.insert(0, 'benchmarks'); import gpu; print([m for m in sys.modules if m == 'torch'])"
    process = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "[]"
