"""Builds the native code with CMake and Ninja. `pip install` goes on without it if it cannot be built.

Environment variables:
    LMFUSION_CUDA=auto|0|1            compile csrc/cuda with nvcc: where it is found (auto), never, or fail without it
    LMFUSION_CUDA_ARCHITECTURES       list such as "80;90a" (the default); PTX of the last one is added
    LMFUSION_BUILD_JOBS               compilers at a time (default: one per core)

What was built, or why not, goes into lmfusion_kernels/_build.json, which `lmfusion_kernels.backends()` reads. Under pip
a failure leaves out only the native part; `python setup.py build_ext --inplace` (`make build`) stops at it instead.

Torch is found by its path and not imported: only its headers and libraries are needed.
"""

import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "lmfusion_kernels"
MINIMUM_TORCH = (2, 10)
LIBRARIES = {"_C": "_C.so", "_layout_native": "_layout_native" + sysconfig.get_config_var("EXT_SUFFIX")}


class BuildError(Exception):
    """Says in one sentence what is missing and what to do."""


def torch_version(torch: Path) -> tuple[int, ...]:
    match = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
    return tuple(int(part) for part in match.groups()) if match else (0, 0)


def find_torch() -> Path | None:
    """The folder of the torch to build against: the first one that is new enough, else the first one.

    Under pip's build isolation `sys.path` lacks the environment to install into, but sysconfig still names it.
    """
    base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    configuration = Path(sys.prefix, "pyvenv.cfg")
    if not configuration.exists() or re.search(r"system-site-packages = true", configuration.read_text()):
        folders += [site.getusersitepackages(), sysconfig.get_path("purelib", vars=base)]
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(folder, "torch") for folder in folders]
    found = [torch for torch in candidates if (torch / "version.py").exists()]
    return next((torch for torch in found if torch_version(torch) >= MINIMUM_TORCH), found[0] if found else None)


def find_program(name: str) -> str | None:
    """A program of the build environment (pip puts it on PATH), else of the environment this python belongs to."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def find_nvcc() -> str | None:
    for folder in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if folder and (nvcc := shutil.which("nvcc", path=str(Path(folder, "bin")))):
            return nvcc
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuda_architectures() -> list[str]:
    """CMake's list: machine code for each architecture, and PTX of the last one for later GPUs."""
    wanted = os.environ.get("LMFUSION_CUDA_ARCHITECTURES", "80;90a")
    names = [name for name in re.split(r"[;,\s]+", wanted) if name]
    if not names or not all(re.fullmatch(r"\d{2,3}[af]?", name) for name in names):
        sys.exit(f"LMFUSION_CUDA_ARCHITECTURES must be a list of architectures such as '80;90a', got {wanted!r}")
    return [f"{name}-real" for name in names] + [names[-1].rstrip("af") + "-virtual"]


def choose_nvcc() -> tuple[str | None, str]:
    """The nvcc to compile CUDA with; or None, and why there is none."""
    setting = os.environ.get("LMFUSION_CUDA", "auto").lower()
    if setting not in ("auto", "0", "1"):
        sys.exit(f"LMFUSION_CUDA must be auto, 0 or 1, got {setting!r}")
    if setting == "0":
        return None, "LMFUSION_CUDA=0 was set when it was built"
    nvcc = find_nvcc()
    if nvcc is None:
        if setting == "1":
            sys.exit("LMFUSION_CUDA=1 needs nvcc, which was not found; put it on PATH or set CUDA_HOME")
        return None, "there was no nvcc when it was built; put it on PATH or set CUDA_HOME, and install lmfusion again"
    return nvcc, ""


def run_logged(command: list[str], log: list[str]) -> bool:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        log.append(line)
    return process.wait() == 0


class CMakeBuild(build_ext):
    """Builds all libraries at once and puts them beside the package's python files."""

    editable_mode = False

    @property
    def required(self) -> bool:
        """Whether a failure stops the build: for `build_ext --inplace`, but not for an installation."""
        return bool(self.inplace) and not self.editable_mode

    @property
    def package_folder(self) -> Path:
        return (ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / PACKAGE

    def run(self) -> None:
        self.package_folder.mkdir(parents=True, exist_ok=True)
        info: dict[str, object] = {
            "torch": None,
            "compiler": None,
            "cuda_architectures": [],
            "cuda_unavailable_reason": "",
        }
        problem = ""
        try:
            self.build(info)
        except BuildError as error:
            problem = str(error)
        info["unavailable_reason"] = problem
        if problem:
            if self.required:
                sys.exit(f"lmfusion: {problem}")
            for name in self.missing:
                (self.package_folder / LIBRARIES[name]).unlink(missing_ok=True)  # of an earlier build: it may not fit
            print(f"lmfusion: native code left out, plain PyTorch takes its place: {problem}")
        elif not info["cuda_architectures"]:
            print(f"lmfusion: built without CUDA: {info['cuda_unavailable_reason']}")
        (self.package_folder / "_build.json").write_text(json.dumps(info, indent=1) + "\n")

    def build(self, info: dict[str, object]) -> None:
        self.missing = list(LIBRARIES)
        again = "and install lmfusion again"
        if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++").split()[0], "g++", "clang++")):
            raise BuildError(f"no C++ compiler was found; install one (Debian, Ubuntu: apt install g++) {again}")
        cmake, ninja = find_program("cmake"), find_program("ninja")
        pybind11 = importlib.util.find_spec("pybind11")
        if cmake is None or ninja is None or pybind11 is None or pybind11.origin is None:
            raise BuildError(f"cmake, ninja or pybind11 is missing; `pip install cmake ninja pybind11` {again}")
        torch = find_torch()
        too_old = torch is not None and torch_version(torch) < MINIMUM_TORCH
        torch = None if too_old else torch
        nvcc, info["cuda_unavailable_reason"] = choose_nvcc()
        # One folder per torch, so that environments do not overwrite each other's builds.
        binary = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{zlib.crc32(str(torch).encode()):08x}"
        options = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": Path(pybind11.origin).parent / "share" / "cmake" / "pybind11",
            "TORCH_DIR": torch or "",
            "LMFUSION_OUTPUT_DIRECTORY": binary / "lib",
        }
        architectures = cuda_architectures() if nvcc else []
        ok, log = self.compile(cmake, binary, options, nvcc, architectures)
        if not ok and nvcc and os.environ.get("LMFUSION_CUDA") != "1" and not self.required:
            info["cuda_unavailable_reason"] = f"nvcc failed: {first_error(log)}"
            architectures = []
            ok, log = self.compile(cmake, binary, options, None, architectures)

        for name in list(self.missing):
            library = binary / "lib" / LIBRARIES[name]
            if library.exists():
                target = self.package_folder / library.name
                # A process may have the old file mapped, so replace the file and do not write into it.
                shutil.copy2(library, target.with_suffix(".new"))
                os.replace(target.with_suffix(".new"), target)
                self.missing.remove(name)
        info["torch"] = ".".join(map(str, torch_version(torch))) if torch else None
        info["cuda_architectures"] = architectures
        info["compiler"] = compiler_of(binary)
        if too_old:
            raise BuildError(f"torch is older than 2.10; `pip install 'torch>=2.10'` {again}")
        if torch is None:
            raise BuildError(f"there was no torch to build against; `pip install 'torch>=2.10'` {again}")
        if not ok or self.missing:
            (binary / "build.log").write_text("".join(log))
            raise BuildError(f"compiling failed ({first_error(log)}); see {binary / 'build.log'}, fix it {again}")

    @staticmethod
    def compile(
        cmake: str, binary: Path, options: dict[str, object], nvcc: str | None, architectures: list[str]
    ) -> tuple[bool, list[str]]:
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        if nvcc:
            definitions += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DLMFUSION_CUDA_ARCHITECTURES={';'.join(architectures)}"]
        definitions.append(f"-DLMFUSION_CUDA={'ON' if nvcc else 'OFF'}")
        shutil.rmtree(binary / "lib", ignore_errors=True)  # so that only libraries of this build are copied
        configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(binary), *definitions]
        log: list[str] = []
        if not run_logged(configure, log):
            shutil.rmtree(binary, ignore_errors=True)  # a cache of another cmake or compiler
            log.clear()
            if not run_logged(configure, log):
                binary.mkdir(parents=True, exist_ok=True)
                return False, log
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jobs = os.environ.get("LMFUSION_BUILD_JOBS") or str(num_cores)
        return run_logged([cmake, "--build", str(binary), "-j", jobs, "--", "-k", "0"], log), log

    def get_outputs(self) -> list[str]:
        return [str(self.package_folder / name) for name in (*LIBRARIES.values(), "_build.json")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def compiler_of(binary: Path) -> str | None:
    for path in binary.glob("CMakeFiles/*/CMakeCXXCompiler.cmake"):
        values = dict(re.findall(r'set\(CMAKE_CXX_COMPILER_(ID|VERSION) "([^"]*)"\)', path.read_text()))
        return f"{values['ID']} {values['VERSION']}"
    return None


def first_error(log: list[str]) -> str:
    lines = [line.strip() for line in log] or ["no output"]
    return next((line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)), lines[-1])


torch = find_torch()
setup(
    ext_modules=[Extension(f"{PACKAGE}.{name}", sources=[]) for name in LIBRARIES],
    cmdclass={"build_ext": CMakeBuild},
    # If a suitable torch is installed, pip need not download a second one into the isolated build environment.
    setup_requires=[] if torch and torch_version(torch) >= MINIMUM_TORCH else ["torch>=2.10"],
)
