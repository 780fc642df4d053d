"""Reads registers, memory and instructions of the compiled kernels in a library or cubin.

Uses NVIDIA's cuobjdump, from PATH or from triton's package. Needs no GPU.
"""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Kernel:
    """A kernel for one architecture."""

    symbol: str
    """The mangled name."""
    architecture: str
    """Such as "sm_90a"."""
    registers: int = 0
    """32-bit registers per thread."""
    stack: int = 0
    """Bytes of local memory per thread: spilled registers, and arrays that are indexed at run time."""
    shared: int = 0
    """Bytes of static shared memory per block."""
    instructions: Counter[str] = field(default_factory=Counter)
    """Occurrences by full mnemonic: LDG.E.128.CONSTANT, HGMMA.64x128x16.F32.BF16, ..."""

    @property
    def name(self) -> str:
        """The name in the source, without namespaces, template arguments and parameters."""
        return source_name(self.symbol)

    def count(self, *words: str) -> int:
        """Instructions whose mnemonic, split at dots, begins with words[0] and contains the other words."""
        return sum(
            number
            for mnemonic, number in self.instructions.items()
            if (parts := mnemonic.split("."))[0] == words[0] and all(word in parts for word in words[1:])
        )

    @property
    def local_accesses(self) -> int:
        """Loads and stores of local memory, which show spills."""
        return self.count("LDL") + self.count("STL")


def find() -> str | None:
    """The path of cuobjdump with nvdisasm beside it, or None."""
    folders = [Path(found).parent] if (found := shutil.which("cuobjdump")) else []
    if (spec := importlib.util.find_spec("triton")) and spec.submodule_search_locations:
        folders.append(Path(spec.submodule_search_locations[0], "backends", "nvidia", "bin"))
    return next(
        (str(f / "cuobjdump") for f in folders if (f / "cuobjdump").exists() and (f / "nvdisasm").exists()), None
    )


def kernels(path: Path) -> list[Kernel]:
    """The kernels in a .so or .cubin, one for each architecture with machine code."""
    found: dict[tuple[str, str], Kernel] = {}
    for kernel in read_resources(dump(path, "-res-usage").splitlines(), default_architecture(path)):
        found[kernel.architecture, kernel.symbol] = kernel
    for (architecture, symbol), instructions in read_sass(dump(path, "-sass").splitlines()).items():
        found[architecture, symbol].instructions = instructions
    return list(found.values())


def dump(path: Path, what: str) -> str:
    program = find()
    assert program is not None, "ask find() first"
    result = subprocess.run([program, what, str(path)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{program} {what} {path}: {result.stderr.strip()[:1000]}")
    return result.stdout


def default_architecture(path: Path) -> str:
    """The architecture of a cubin, which its list of resources lacks."""
    match = re.search(r"code for (sm_\w+)", dump(path, "-sass")) if path.suffix == ".cubin" else None
    return match.group(1) if match else ""


def read_resources(lines: Iterable[str], architecture: str = "") -> list[Kernel]:
    found: list[Kernel] = []
    symbol = ""
    for line in lines:
        if match := re.match(r"arch = (sm_\w+)", line):
            architecture = match.group(1)
        elif match := re.match(r"\s*Function (\S+):", line):
            symbol = match.group(1)
        elif symbol and (numbers := dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line))):
            registers, stack, shared, local = (int(numbers[key]) for key in ("REG", "STACK", "SHARED", "LOCAL"))
            found.append(Kernel(symbol, architecture, registers, stack + local, shared))
            symbol = ""
    return found


def read_sass(lines: Iterable[str]) -> dict[tuple[str, str], Counter[str]]:
    """Mnemonics by architecture and symbol."""
    found: dict[tuple[str, str], Counter[str]] = {}
    architecture, is_fatbin = "", False
    counter: Counter[str] = Counter()
    for line in lines:
        if match := re.match(
            r"arch = (sm_\w+)", line
        ):  # in a library; the "code for" line below lacks the "a" of sm_90a
            architecture, is_fatbin = match.group(1), True
        elif not is_fatbin and (match := re.match(r"\s*code for (sm_\w+)", line)):
            architecture = match.group(1)
        elif match := re.match(r"\s*Function : (\S+)", line):
            counter = found.setdefault((architecture, match.group(1)), Counter())
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", line):
            counter[match.group(1)] += 1
    return found


def source_name(symbol: str) -> str:
    """The last identifier of an Itanium-mangled name: toy of _ZN3lmf12_GLOBAL__N_13toyIfEEvPf."""
    if not symbol.startswith("_Z"):
        return symbol
    rest = symbol[3:] if symbol.startswith("_ZN") else symbol[2:]
    name = ""
    while match := re.match(r"\d+", rest):
        length = int(match.group())
        name, rest = rest[match.end() : match.end() + length], rest[match.end() + length :]
    return name


def ptx_architectures(path: Path) -> set[str]:
    """The architectures that a library has PTX for, which newer devices compile for themselves."""
    return set(re.findall(r"\.(sm_\w+)\.ptx", dump(path, "-lptx")))
