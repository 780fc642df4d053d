"""Compiles csrc/cuda for the emulation: each .cu file by g++ as C++, with every memory access instrumented.

Objects are cached by content in build/cuda_emulation of the checkout. `library()` returns the path of the shared
library.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
SOURCES = Path(__file__).resolve().parent / "cuda"
CACHE = ROOT / "build" / "cuda_emulation"
TORCH = Path(torch.__file__).resolve().parent

MINIMUM_GCC = 12  # the first with _Float16 in C++
# -fsanitize only makes g++ insert the calls. They call functions of memory.cpp; no sanitizer library is linked.
INSTRUMENTED = ["-fsanitize=thread,alignment", "--param=tsan-instrument-func-entry-exit=0"]
STABLE = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
COMMON = ["-std=gnu++17", "-g1", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", f"-I{SOURCES}"]
COMMON += [f"-isystem{TORCH / 'include'}", "-isystem" + str(TORCH / "include" / "torch" / "csrc" / "api" / "include")]
KERNELS = ["-xc++", "-DLMF_CUDA_EMULATION", "-DLMF_ISA=cuda", "-Wno-unknown-pragmas", "-Wno-attributes"]
KERNELS += [f"-I{ROOT / 'csrc'}", "-include", str(SOURCES / "cuda_emulation.h")]


def unavailable_reason() -> str:
    """Why the emulation cannot be built here; "" if it can."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return "the CUDA emulation needs Linux on x86-64 or aarch64"
    if (program := compiler()) is None:
        return "the CUDA emulation needs g++; install it or set CXX"
    version = subprocess.run([program, "-dumpversion"], capture_output=True, text=True, check=False).stdout
    if int(version.split(".")[0] or 0) < MINIMUM_GCC:
        return f"the CUDA emulation needs g++ {MINIMUM_GCC} or later, got {version.strip()}; install one or set CXX"
    if not (ROOT / "csrc").is_dir():
        return "not a checkout: csrc is not here"
    return ""


def compiler() -> str | None:
    asked = os.environ.get("CXX")
    return shutil.which(asked) if asked and "g++" in asked else shutil.which("g++")


def commands() -> dict[Path, list[str]]:
    """The compiler's options by source file."""
    own = {SOURCES / name: [*COMMON, "-O2"] for name in ("emulator.cpp", "memory.cpp")}
    kernels = [SOURCES / "faulty.cu", ROOT / "csrc" / "schemas.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    return own | {path: [*COMMON, "-O1", *INSTRUMENTED, *STABLE, *KERNELS] for path in kernels}


def library() -> Path:
    """The compiled library; builds what is not in the cache. Raises RuntimeError with the compiler's errors."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:  # of several test processes, one compiles and the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(compile_one, *zip(*commands().items(), strict=True)))
        target = CACHE / f"lmfusion_emulated-{digest(*objects)}.so"
        if not target.exists():
            libraries = [str(TORCH / "lib" / f"lib{name}.so") for name in ("torch", "torch_cpu", "c10")]
            run([str(compiler()), "-shared", "-o", f"{target}.new", *map(str, objects), *libraries])
            Path(f"{target}.new").rename(target)
        for path in CACHE.glob("*.[os]*"):
            if path != target and path not in objects:
                path.unlink()
    return target


def compile_one(source: Path, options: list[str]) -> Path:
    headers = [
        path
        for pattern in ("*.h", "common/*.h", "elementwise/*.h", "cuda/*.cuh")
        for path in sorted((ROOT / "csrc").glob(pattern))
    ]
    headers += sorted(SOURCES.glob("*.h"))
    key = digest(source, *headers, salt=" ".join([torch.__version__, str(compiler()), *options]))
    target = CACHE / f"{source.stem}-{key}.o"
    if not target.exists():
        run([str(compiler()), *options, "-c", str(source), "-o", f"{target}.new"])
        Path(f"{target}.new").rename(target)
    return target


def digest(*paths: Path, salt: str = "") -> str:
    content = hashlib.sha256(salt.encode())
    for path in paths:
        content.update(path.name.encode() + b"\0" + path.read_bytes())
    return content.hexdigest()[:16]


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[:8000]}")
