"""Runs everything that needs a GPU: build, tests, memory checks, tuning, benchmarks and a report (`make gpu`).

    python benchmarks/gpu.py [output folder] [--budget SECONDS]

Uses the installed python and torch (this python, or the checkout's .venv if this one has no torch) and downloads
nothing. Every step has a time limit. A failure does not stop other steps; the end of the output lists what failed or
could not run. Without a GPU it runs the steps that can run, and names the others.

The output folder gets summary.json (every command: passed, failed, timed out or skipped, and why), results.json (the
benchmarks' rows, and the counts of the tests), the pages of benchmarks/harness/gpu_report.py, and logs.txt (all
output). The exit status is 1 if anything that ran failed, or if tests or benchmarks did not run on a GPU; else 0."""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
FILES = ("summary.json", "results.json", "results.md", "plots.svg", "attention_table.json", "logs.txt")
DEFAULT_BUDGET = 470.0
GRACE = 12.0
"""Seconds between the interruption of a command and its end by force."""
REPORT_SECONDS = 30.0
MARGIN = 40.0
"""Seconds that are withheld from a command that gets a time limit: for imports, and to finish the current row."""
LOG_LINES = 25
"""Lines of a failed command's log that are shown at the end."""

PROBE = """
import importlib.util, json, platform
def there(name): return importlib.util.find_spec(name) is not None
names = "pytest hypothesis pytest_timeout xdist pytest_benchmark transformers triton matplotlib pybind11".split()
found = {"python": platform.python_version(), "modules": [name for name in names if there(name)], "torch": None}
found["gpu"] = found["capability"] = None
if there("torch"):
    import torch
    found["torch"], found["cuda"] = torch.__version__, torch.version.cuda
    if torch.cuda.is_available():
        found["gpu"], found["capability"] = torch.cuda.get_device_name(), list(torch.cuda.get_device_capability())
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Command:
    """One process. `name` is the title of its log; `junit` is the file for pytest's results, if it runs pytest.

    seconds_in: the environment variable that gets the number of seconds it has. refusal: a text in the log of a failure
    that only means that the command cannot run on this machine.
    """

    name: str
    arguments: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    junit: Path | None = None
    seconds_in: str = ""
    refusal: str = ""


@dataclass(frozen=True)
class Step:
    """Commands that run side by side, `jobs` at a time, for at most `limit` seconds together."""

    name: str
    limit: float
    commands: Sequence[Command] = ()
    reserve: float = 0.0
    """Seconds of the budget that earlier steps must leave for it."""
    jobs: int = 1
    is_optional: bool = False
    """It is left out if less than its limit is left; any other step without time counts as timed out."""
    missing: str = ""
    """Why it cannot run here."""


@dataclass
class Outcome:
    """The result of one command, or of a step that could not start."""

    step: str
    name: str
    status: str
    """passed, failed, timed out or skipped"""
    detail: str = ""
    seconds: float = 0.0
    tests: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    skips: dict[str, int] = field(default_factory=dict)
    """How many tests each reason skipped."""
    log: str = ""

    @property
    def is_bad(self) -> bool:
        return self.status in ("failed", "timed out")

    def line(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.tests.items() if count)
        parts = [self.status, counts, self.detail, f"{self.seconds:.0f} s" if self.seconds else ""]
        return f"{self.step}/{self.name}: " + "; ".join(part for part in parts if part)


class Runner:
    """Runs steps within one budget of seconds and records their outcomes in `output`."""

    def __init__(self, output: Path, budget: float = DEFAULT_BUDGET) -> None:
        self.output, self.end = output, time.monotonic() + budget
        self.outcomes: list[Outcome] = []
        self.found: dict[str, Any] = {}
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            # A background job of a shell ignores SIGINT. Commands would inherit that and could not be interrupted.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        output.mkdir(parents=True, exist_ok=True)
        for old in FILES:
            (output / old).unlink(missing_ok=True)

    def run(self, steps: Sequence[Step], reserve: float = 0.0) -> None:
        """Run the steps one after another, leaving `reserve` seconds of the budget."""
        for i, step in enumerate(steps):
            reserved = reserve + sum(later.reserve for later in steps[i + 1 :] if not later.missing)
            seconds = min(step.limit, self.end - time.monotonic() - reserved)
            if step.missing:
                self.add(Outcome(step.name, "all", "skipped", step.missing))
            elif step.is_optional and seconds < step.limit:
                self.add(Outcome(step.name, "all", "skipped", "too little time left of the budget"))
            elif seconds <= 0:
                self.add(Outcome(step.name, "all", "timed out", "no time left of the budget"))
            else:
                self.run_commands(step, seconds)
            self.write_summary()

    def run_commands(self, step: Step, seconds: float) -> None:
        print(f"== {step.name} (at most {seconds:.0f} s)", flush=True)
        deadline = time.monotonic() + seconds
        waiting, running = list(step.commands), list[_Process]()
        while waiting or running:
            while waiting and len(running) < step.jobs and time.monotonic() < deadline:
                running.append(_Process(step.name, waiting.pop(0), deadline))
            for process in list(running):
                if process.is_over(deadline):
                    running.remove(process)
                    outcome, log = process.finish()
                    self.add(outcome)
                    with (self.output / "logs.txt").open("a") as file:
                        file.write(f"==== {outcome.line()}\n{log}\n")
            if waiting and not running and time.monotonic() >= deadline:
                for command in waiting:
                    self.add(Outcome(step.name, command.name, "timed out", "no time left of the step's limit"))
                return
            time.sleep(0.05)

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        print(f"   {outcome.line()}", flush=True)

    def summary(self) -> dict[str, Any]:
        commands = [{k: v for k, v in vars(outcome).items() if k != "log" and v} for outcome in self.outcomes]
        return {"machine": self.found, "failed": [o.line() for o in self.outcomes if o.is_bad], "commands": commands}

    def write_summary(self) -> None:
        (self.output / "summary.json").write_text(json.dumps(self.summary(), indent=1) + "\n")

    def finish(self) -> int:
        """Print what failed and what did not run. Returns the exit status."""
        self.write_summary()
        bad = [outcome for outcome in self.outcomes if outcome.is_bad]
        for outcome in bad:
            print(f"\n==== end of the log of {outcome.step}/{outcome.name}")
            print("\n".join(outcome.log.splitlines()[-LOG_LINES:]))
        print(f"\n== results in {self.output}: {', '.join(sorted(path.name for path in self.output.iterdir()))}")
        for outcome in self.outcomes:
            if outcome.status == "skipped":
                print(f"not run: {outcome.step}/{outcome.name}: {outcome.detail}")
        for outcome in bad:
            print(f"FAILED: {outcome.line()} (logs.txt)")
            for failure in outcome.failures[:20]:
                print(f"    {failure}")
        whole_steps = [o.step for o in self.outcomes if o.status == "skipped" and o.name == "all"]
        left_out = {"tests", "benchmarks"}.intersection(whole_steps)
        if bad or (left_out and self.found.get("gpu")):
            print("== not everything passed", flush=True)
            return 1
        print("== everything that ran passed", flush=True)
        return 0


class _Process:
    """A running command with its own log file, in a process group that can be stopped as a whole."""

    def __init__(self, step: str, command: Command, deadline: float) -> None:
        self.step, self.command, self.start = step, command, time.monotonic()
        self.stopped_at, self.log = 0.0, tempfile.TemporaryFile()  # noqa: SIM115
        self.error = ""
        self.process: subprocess.Popen[bytes] | None = None
        environment = {**os.environ, **ENVIRONMENT, **command.environment}
        if command.seconds_in:
            environment[command.seconds_in] = f"{max(0.0, deadline - self.start - MARGIN):.0f}"
        try:
            self.process = subprocess.Popen(
                command.arguments, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=self.log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self.error = f"{command.arguments[0]} does not start: {error.strerror}"

    def is_over(self, deadline: float) -> bool:
        """Whether it has ended. After the deadline it is interrupted, so that pytest writes its results, and then
        killed."""
        if self.process is None or self.process.poll() is not None:
            return True
        now = time.monotonic()
        if now >= deadline and not self.stopped_at:
            self.stopped_at = now
            self.signal(signal.SIGINT)
        if self.stopped_at and now >= self.stopped_at + GRACE:
            self.signal(signal.SIGKILL)
            return now >= self.stopped_at + GRACE + 4  # a process that hangs in the driver is abandoned
        return False

    def signal(self, number: int) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def finish(self) -> tuple[Outcome, str]:
        if self.process is not None:
            self.signal(signal.SIGKILL)  # child processes that still run
        self.log.seek(0)
        text = self.log.read().decode(errors="replace") + self.error
        self.log.close()
        status, detail = "passed", ""
        if self.process is None:
            status, detail = "failed", self.error
        elif self.stopped_at:
            status, detail = "timed out", f"stopped after {self.stopped_at - self.start:.0f} s"
        elif self.process.returncode:
            code = self.process.returncode
            status = "failed"
            detail = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            if self.command.refusal and self.command.refusal in text:
                status, detail = "skipped", f"its log says: {self.command.refusal}"
        outcome = Outcome(self.step, self.command.name, status, detail, round(time.monotonic() - self.start, 1))
        outcome.log = text
        if self.command.junit is not None and self.command.junit.exists():
            read_junit(self.command.junit, outcome)
            self.command.junit.unlink()
        return outcome, text


def read_junit(path: Path, outcome: Outcome) -> None:
    """Add counts, names of failed tests and reasons of skips from pytest's XML file to `outcome`."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except ElementTree.ParseError:
        return
    results, skips = Counter[str](), Counter[str]()
    for case in cases:
        child = next((c for c in case if c.tag in ("failure", "error", "skipped")), None)
        results["passed" if child is None else {"failure": "failed", "error": "failed"}.get(child.tag, "skipped")] += 1
        if child is not None and child.tag == "skipped":
            skips[child.get("message", "").removeprefix("Skipped: ")] += 1
        elif child is not None:
            first_line = (child.get("message") or "").split("\n")[0][:200]
            outcome.failures.append(f"{case.get('classname')}::{case.get('name')}: {first_line}")
    outcome.tests, outcome.skips = dict(results), dict(skips)


def find_python() -> str:
    """This python if it has torch, else the checkout's environment if there is one."""
    venv = ROOT / ".venv" / "bin" / "python"
    has_torch = importlib.util.find_spec("torch") is not None
    return sys.executable if has_torch or not venv.exists() else str(venv)


def find_sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def probe(python: str) -> dict[str, Any]:
    """Versions, GPU and modules of `python`, found by a process of its own."""
    try:
        process = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, timeout=90)
        found = json.loads(process.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        found = {"python": None, "modules": [], "torch": None, "gpu": None, "capability": None}
    return {**found, "executable": python}


def make_plan(python: str, found: dict[str, Any], output: Path) -> list[Step]:
    """The steps for this machine."""
    modules, has_gpu = set(found["modules"]), found["gpu"] is not None
    no_torch = "" if found["torch"] else f"{python} has no torch; set PYTHON=..., or run `make build`"
    no_gpu = no_torch or ("" if has_gpu else "torch finds no GPU")
    no_pytest = no_torch or missing_modules(modules, "pytest", "hypothesis")
    no_benchmark = no_pytest or missing_modules(modules, "pytest_benchmark")
    # Without pytest-timeout its setting in pyproject.toml is unknown, which --strict-config makes an error.
    plain = [] if "pytest_timeout" in modules else ["-o", "addopts=-ra --strict-markers --import-mode=importlib"]
    pytest = [python, "-m", "pytest", *plain, "-q", "-p", "no:cacheprovider"]
    cores = len(os.sched_getaffinity(0))

    build = Command("setup.py", [python, "setup.py", "-q", "build_ext", "--inplace"], build_environment(found))
    backends = Command("backends", [python, "-c", "import lmfusion_kernels as lk; print(lk.backends())"])
    steps = [
        Step("device", 20, [Command("nvidia-smi", ["nvidia-smi"])], missing="" if has_gpu else no_gpu),
        Step("build", 240 if has_gpu else 330, [build], missing=no_torch),
        Step("backends", 40, [backends], missing=no_torch),
    ]

    options = ["--benchmark-disable"] if "pytest_benchmark" in modules else []
    if "xdist" in modules and cores >= 8:
        options += ["-n", "3", "--dist", "worksteal"]
    if "pytest_timeout" in modules:  # a signal cannot end the wait for a kernel that hangs
        options += ["--timeout", "150", "--timeout-method", "thread"]
    environment = {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    tests = []
    for path in sorted((ROOT / "tests" / "kernels" / "gpu").glob("test_*.py")):
        junit = output / f"{path.stem}.xml"
        tests.append(Command(path.name, [*pytest, *options, f"--junitxml={junit}", str(path)], environment, junit))
    sanitizer = find_sanitizer()
    no_sanitizer = no_gpu or ("" if sanitizer else "compute-sanitizer is not installed; it comes with the CUDA toolkit")
    if no_sanitizer:
        steps.append(Step("compute-sanitizer", 0, missing=no_sanitizer))
    else:
        tests += sanitize(python, str(sanitizer))
    if has_gpu:
        steps.append(Step("tests", 200, tests, reserve=60, jobs=max(1, cores // 2), missing=no_pytest))
    else:
        collect = Command("collection", [*pytest, "--collect-only", "tests/kernels/gpu"])
        steps.append(Step("collection of tests/kernels/gpu", 60, [collect], missing=no_pytest))
        steps.append(Step("tests", 0, missing=no_gpu))

    environment = {"LMFUSION_BENCHMARK_OUTPUT": str(output)}
    if has_gpu:
        arguments = [*pytest, "benchmarks", "--benchmark-only"]
        benchmarks = Command("benchmarks", arguments, environment, seconds_in="LMFUSION_BENCHMARK_SECONDS")
        steps.append(Step("benchmarks", 300, [benchmarks], reserve=130, missing=no_benchmark))
    else:
        short = Command("swiglu", [*pytest, "benchmarks/cases/test_swiglu.py", "--benchmark-only"], environment)
        steps.append(Step("one benchmark on the CPU", 120, [short], missing=no_benchmark))
        steps.append(Step("benchmarks", 0, missing=f"{no_gpu}; `make bench` runs them on the CPU"))
    tuning = Command("tune_attention.py", [python, "-m", "benchmarks.tune_attention", "--budget", "30"])
    no_tuning = no_gpu or missing_modules(modules, "triton")
    steps.append(Step("tuning", 60, [tuning], is_optional=True, missing=no_tuning))
    return steps


def sanitize(python: str, sanitizer: str) -> list[Command]:
    """Commands that run every kernel under the memory checker, and those of csrc/cuda also under the race checker."""
    checked = [python, "tests/kernels/gpu/sanitize.py"]
    # With the caching allocator, an access out of bounds could hit a neighbouring tensor unnoticed.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # Failed calls of CUDA's API raise in torch, Triton or csrc/cuda anyway. Mere queries that fail (for a function of
    # another driver, for the device of a pointer) would count as errors here.
    memcheck = [sanitizer, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9", *checked]
    # racecheck does not understand the asynchronous copies of Triton's kernels.
    racecheck = [sanitizer, "--tool", "racecheck", "--error-exitcode", "9", *checked, "--no-triton"]
    refusal = "Device not supported"  # in virtual machines that hide the driver's debugger interface
    return [
        Command("memcheck", memcheck, uncached, refusal=refusal),
        Command("racecheck", racecheck, refusal=refusal),
    ]


def make_report_plan(python: str, found: dict[str, Any], output: Path) -> list[Step]:
    """The step that turns results.json into pages."""
    results = output / "results.json"
    missing = "" if results.exists() and found["torch"] else "the benchmarks wrote no results.json"
    report = Command("report", [python, "-m", "benchmarks.harness.gpu_report", str(results)])
    return [Step("report", REPORT_SECONDS, [report], missing=missing)]


def missing_modules(modules: set[str], *names: str) -> str:
    absent = [name for name in names if name not in modules]
    return f"python modules are missing: {', '.join(absent)}" if absent else ""


def build_environment(found: dict[str, Any]) -> dict[str, str]:
    """Compile only for this GPU, which halves the time, unless the caller chose architectures."""
    if found["capability"] is None or "LMFUSION_CUDA_ARCHITECTURES" in os.environ:
        return {}
    major, minor = found["capability"]
    return {"LMFUSION_CUDA_ARCHITECTURES": f"{major}{minor}{'a' if major >= 9 else ''}"}


def add_tests(output: Path, summary: dict[str, Any]) -> None:
    """Write the counts of the tests into results.json, so that numbers and their tests stay together."""
    path = output / "results.json"
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError):
        return
    commands = [command for command in summary["commands"] if command["step"] == "tests"]
    path.write_text(json.dumps({**results, "tests": commands}, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", default="runs/gpu", type=Path)
    parser.add_argument("--budget", type=float, default=DEFAULT_BUDGET, help="seconds for all steps together")
    options = parser.parse_args(arguments)
    output = options.output.resolve()
    # Started in a shell's background, SIGINT would be ignored, also by the commands, which could not be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runner = Runner(output, options.budget)
    python = find_python()
    found = runner.found = probe(python)
    for name, value in found.items():
        print(f"{name:12} {value if not isinstance(value, list) else ' '.join(map(str, value))}", flush=True)
    runner.run(make_plan(python, found, output), reserve=REPORT_SECONDS)
    add_tests(output, runner.summary())
    runner.run(make_report_plan(python, found, output))
    return runner.finish()


if __name__ == "__main__":
    sys.exit(main())
