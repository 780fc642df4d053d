"""The native sources compile against the headers of the oldest torch that the metadata promises.

The build cannot show this: it uses the pinned torch, whose headers may declare more than the oldest ones. `make test`
unpacks the oldest headers into the environment. CMake says how the build compiles each source.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
OLDEST = Path(sys.prefix, "oldest", "torch")
pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not a checkout"),
    pytest.mark.skipif(
        not OLDEST.is_dir(), reason=f"{OLDEST} is missing: `make test` unpacks the oldest torch's headers there"
    ),
]


def find_nvcc() -> str | None:
    folders = [str(Path(os.environ[name], "bin")) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = (shutil.which("nvcc", path=folder) for folder in [*folders, *os.get_exec_path(), "/usr/local/cuda/bin"])
    return os.environ.get("CUDACXX") or next(filter(None, found), None)


def find_program(name: str) -> str:
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        pytest.skip(f"{name} is missing: `pip install {name}`")
    return path


def configure(folder: Path, nvcc: str | None) -> dict[Path, list[str]]:
    """The compiler's command for each source of the build, against the oldest headers."""
    pybind11 = importlib.util.find_spec("pybind11")
    if pybind11 is None or pybind11.origin is None:
        pytest.skip("pybind11 is missing: `pip install pybind11`")
    definitions = {
        "CMAKE_MAKE_PROGRAM": find_program("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": Path(pybind11.origin).parent / "share" / "cmake" / "pybind11",
        "TORCH_DIR": OLDEST,
        "LMFUSION_CUDA": "ON" if nvcc else "OFF",
        "LMFUSION_CUDA_ARCHITECTURES": "90a-virtual",  # only PTX: other tests check the machine code
    }
    if nvcc:
        definitions["CMAKE_CUDA_COMPILER"] = nvcc
    command = [find_program("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)]
    command += [f"-D{name}={value}" for name, value in definitions.items()]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    commands: dict[Path, list[str]] = {}
    for entry in json.loads((folder / "compile_commands.json").read_text()):
        # Kernels of csrc/cpu are listed once per instruction set, which does not matter for the headers.
        commands.setdefault(Path(entry["file"]), shlex.split(entry["command"]))
    return commands


def compile_only(source: Path, command: list[str], folder: Path) -> str:
    """The compiler's errors; "" if the source compiles. No machine code is generated, and warnings are off."""
    at = command.index("-o")
    command = command[:at] + command[at + 2 :] + ["-w"]
    if source.suffix == ".cu":
        command += ["-Xcompiler=-fsyntax-only", "-o", os.devnull]
    else:
        command[command.index("-c")] = "-fsyntax-only"
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return result.stderr[-2000:] or "no message" if result.returncode else ""


@pytest.mark.slow
@pytest.mark.parametrize("language", ["C++", "CUDA"])
def test_every_source_compiles(language, tmp_path):
    nvcc = find_nvcc() if language == "CUDA" else None
    if language == "CUDA" and nvcc is None:
        pytest.skip("there is no nvcc; put it on PATH or set CUDA_HOME")
    suffix = {"C++": ".cpp", "CUDA": ".cu"}[language]
    commands = {path: words for path, words in configure(tmp_path, nvcc).items() if path.suffix == suffix}
    assert set(commands) == set((ROOT / "csrc").rglob(f"*{suffix}"))
    assert all(
        str(OLDEST / "include") in " ".join(words)
        for path, words in commands.items()
        if "layout_module" not in path.parts
    )
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        answers = pool.map(lambda item: compile_only(*item, tmp_path), commands.items())
        failed = {path.name: answer for path, answer in zip(commands, answers, strict=True) if answer}
    assert not failed, "\n".join(f"{name}: {answer}" for name, answer in failed.items())


def test_the_headers_are_those_of_the_oldest_promised_torch():
    header = (OLDEST / "include" / "torch" / "headeronly" / "version.h").read_text()
    version = tuple(int(n) for n in re.findall(r"#define TORCH_VERSION_M(?:AJ|IN)OR (\d+)", header))
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "torch>={}.{}".format(*version) in requirements
    assert "TORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000 ".format(*version) in (ROOT / "CMakeLists.txt").read_text()
    assert "MINIMUM_TORCH = ({}, {})\n".format(*version) in (ROOT / "setup.py").read_text()
