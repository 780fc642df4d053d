"""Parses the text of a PTX module: parameters, registers, shared memory, labels and instructions of one kernel."""

import re
from dataclasses import dataclass, field

from tests.kernels.ptx_emulation.values import WIDTH, EmulationError

_ENTRY = r"\.entry\s+(\w+)\s*\((.*?)\)\s*(.*?)\{"
_PARAMETER = (
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)"
    r"(?:\s+\.ptr(?:\s+\.(?:global|shared|const|local))?(?:\s+\.align\s+\d+)?)?\s+(?P<name>\w+)(?:\[(?P<count>\d+)\])?\s*$"
)


@dataclass
class Instruction:
    """One instruction, its operands still as text."""

    text: str
    op: str
    modifiers: list[str]
    arguments: list[str]
    predicate: str | None = None
    is_negated: bool = False
    target: int | None = None
    """Of a branch: the number of the instruction it goes to."""

    @property
    def types(self) -> list[str]:
        return [modifier for modifier in self.modifiers if modifier in WIDTH]

    @property
    def name(self) -> str:
        """The modifiers as they were written."""
        return ".".join(self.modifiers)


@dataclass
class Parameter:
    offset: int
    size: int
    type: str


@dataclass
class Kernel:
    """A kernel as it was compiled."""

    name: str
    parameters: dict[str, Parameter]
    parameter_bytes: int
    num_threads: int | None
    """What .reqntid asks for."""
    extern_shared: list[str]
    registers: dict[str, str] = field(default_factory=dict)
    """Type by name. A register of an inner scope has the number of its scope behind an @."""
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_tables: dict[str, list[str]] = field(default_factory=dict)
    shared_symbols: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    """Of shared memory that is declared in the kernel."""


def split_arguments(text: str) -> list[str]:
    """Parts between commas that are in no bracket."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    return [*parts, current.strip()] if current.strip() else parts


def vector(argument: str) -> list[str]:
    """The registers of an operand: several in braces, or one."""
    return split_arguments(argument[1:-1]) if argument.startswith("{") else [argument]


def parse(ptx: str, name: str | None = None) -> Kernel:
    """The kernel called `name`, or the first. Raises EmulationError if there is none."""
    ptx = re.sub(r"/\*.*?\*/", "", ptx, flags=re.DOTALL)
    ptx = re.sub(r"//[^\n]*", "", ptx)
    if debug_info := re.search(r"^\s*\.section", ptx, re.MULTILINE):
        ptx = ptx[: debug_info.start()]
    entry = next((e for e in re.finditer(_ENTRY, ptx, re.DOTALL) if name in (None, e[1])), None)
    if entry is None:
        raise EmulationError(f"the module has no kernel {name or ''}")
    parameters, num_bytes = _parameters(entry[2])
    threads = re.search(r"\.reqntid\s+(\d+)", entry[3])
    kernel = Kernel(
        name=entry[1],
        parameters=parameters,
        parameter_bytes=num_bytes,
        num_threads=int(threads[1]) if threads else None,
        extern_shared=re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\]", ptx[: entry.start()]),
    )
    _Body(kernel).parse(ptx[entry.end() :])
    return kernel


def _parameters(text: str) -> tuple[dict[str, Parameter], int]:
    parameters, offset = {}, 0
    for declaration in split_arguments(text):
        found = re.match(_PARAMETER, declaration)
        if found is None:
            raise EmulationError(f"parameter {declaration}")
        size = WIDTH[found["type"]] // 8 * int(found["count"] or 1)
        align = int(found["align"] or size)
        offset = -(-offset // align) * align
        parameters[found["name"]] = Parameter(offset, size, found["type"])
        offset += size
    return parameters, offset


class _Body:
    """Reads the statements of a kernel. Registers and labels belong to the scope, in braces, that declares them."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes = [""]
        self.declared: list[set[str]] = [set()]
        self.num_scopes = 0
        self.branches: list[tuple[Instruction, str, list[str]]] = []

    def parse(self, body: str) -> None:
        label = re.compile(r"([$\w%]+)\s*:(?!:)")
        position = 0
        while self.scopes:
            while body[position].isspace():
                position += 1
            if body[position] in "{}":
                self._enter_or_leave(body[position])
                position += 1
            elif found := label.match(body, position):
                self.kernel.labels[found[1] + self.scopes[-1]] = len(self.kernel.instructions)
                position = found.end()
            elif body.startswith((".loc", ".file"), position):
                position = body.index("\n", position) + 1
            else:
                end = body.index(";", position)
                self._statement(" ".join(body[position:end].split()))
                position = end + 1
        self._resolve_branches()

    def _enter_or_leave(self, brace: str) -> None:
        if brace == "{":
            self.num_scopes += 1
            self.scopes.append(f"@{self.num_scopes}")
            self.declared.append(set())
        else:
            self.scopes.pop()
            self.declared.pop()

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith(".shared"):
            align, name, size = re.match(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d+)\]", text).groups()
            start = -(-self.kernel.shared_bytes // int(align)) * int(align)
            self.kernel.shared_symbols[name] = start
            self.kernel.shared_bytes = start + int(size)
        elif text.startswith(".branchtargets"):
            here = len(self.kernel.instructions)
            label = next(name for name, at in reversed(self.kernel.labels.items()) if at == here)
            self.kernel.branch_tables[label] = [target.strip() for target in text.split(None, 1)[1].split(",")]
        elif not text.startswith("."):
            self._instruction(text)

    def _registers(self, text: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()
        for name in map(str.strip, names.split(",")):
            if several := re.match(r"([%\w]+)<(\d+)>", name):
                self.kernel.registers |= {f"{several[1]}{i}": kind for i in range(int(several[2]))}
            else:
                self.declared[-1].add(name)
                self.kernel.registers[name + self.scopes[-1]] = kind

    def _instruction(self, text: str) -> None:
        whole, predicate, is_negated = text, None, False
        if found := re.match(r"@(!?)([%\w]+)\s+(.*)", text):
            is_negated, predicate, text = found[1] == "!", self._renamed(found[2]), found[3]
        op, arguments = re.match(r"([\w.:]+)\s*(.*)", text).groups()
        op, *modifiers = op.split(".")
        names = [re.sub(r"[%$\w]+", lambda name: self._renamed(name[0]), item) for item in split_arguments(arguments)]
        instruction = Instruction(whole, op, modifiers, names, predicate, is_negated)
        self.kernel.instructions.append(instruction)
        if op == "bra":
            self.branches.append((instruction, names[-1], self.scopes[::-1]))

    def _renamed(self, name: str) -> str:
        scopes = zip(reversed(self.scopes), reversed(self.declared), strict=True)
        return next((name + scope for scope, declared in scopes if name in declared), name)

    def _resolve_branches(self) -> None:
        for instruction, label, scopes in self.branches:
            found = next((label + scope for scope in scopes if label + scope in self.kernel.labels), None)
            if found is None:
                raise EmulationError(f"there is no label {label}")
            instruction.target = self.kernel.labels[found]
