"""Finds missing fences between ordinary writes to shared memory and asynchronous reads, in a kernel's PTX.

wgmma and bulk copies access shared memory through the async proxy; st.shared and cp.async write it through the generic
proxy. There must be a fence.proxy.async between such a write and such a read, and for cp.async after the wait for it.
Bulk copies (TMA) into shared memory need none. Addresses are not compared: any unfenced write counts for any read.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

WRITE = re.compile(r"st(\.\w+)*\.shared|stmatrix|(atom|red)(\.\w+)*\.shared")
COPY = re.compile(r"cp\.async\.(ca|cg)\.shared")
WAIT = re.compile(r"cp\.async\.(wait_group|wait_all|mbarrier)")
WAIT_FOR_ALL = re.compile(r"cp\.async\.(wait_all|wait_group\s+0$)")
FENCE = re.compile(r"fence\.proxy\.async(\.shared::\w+)?$")
READ = re.compile(r"wgmma\.mma_async|cp\.(reduce\.)?async\.bulk(\.\w+)*\.global\.shared")
JUMP = re.compile(r"bra(?:\.uni)?\s+([$\w%]+)$")
END = re.compile(r"(ret|exit|trap)$")


@dataclass(frozen=True)
class Instruction:
    text: str
    """The instruction without its predicate."""
    is_predicated: bool
    targets: tuple[str, ...] = ()
    """The targets of a branch, as labels with their scope."""


@dataclass(frozen=True)
class Unfenced:
    """A read through the async proxy that an unfenced write may reach."""

    read: str
    write: str

    def __str__(self) -> str:
        return f"{self.read} may read what {self.write} wrote, and there is no fence.proxy.async between"


Written = frozenset[tuple[str, bool]]
"""The writes that may have no fence yet, and whether each has arrived: a cp.async has arrived after a wait for it."""


def unfenced_reads(ptx: str) -> list[Unfenced]:
    """Every pair of write and read that a path through a kernel connects without a fence."""
    found: set[Unfenced] = set()
    for body in _bodies(ptx):
        instructions, labels = _parse(body)
        if not any(READ.match(instruction.text) for instruction in instructions):
            continue
        before: dict[int, Written] = {0: frozenset()}
        to_visit = [0]
        while to_visit:
            place = to_visit.pop()
            if place >= len(instructions):
                continue
            instruction, written = instructions[place], before[place]
            if READ.match(instruction.text):
                found |= {Unfenced(_short(instruction.text), write) for write, has_arrived in written if has_arrived}
            after = _after(instruction, written)
            for following in _following(place, instruction, labels):
                if following not in before or not after <= before[following]:
                    before[following] = before.get(following, frozenset()) | after
                    to_visit.append(following)
    return sorted(found, key=str)


def _after(instruction: Instruction, written: Written) -> Written:
    text = instruction.text
    if WRITE.match(text):
        return written | {(_short(text), True)}
    if COPY.match(text):
        return written | {(_short(text), False)}
    if WAIT.match(text):
        arrived = {(write, True) for write, _ in written}
        waits_for_all = WAIT_FOR_ALL.match(text) and not instruction.is_predicated
        return frozenset(arrived) if waits_for_all else written | arrived
    if FENCE.match(text) and not instruction.is_predicated:
        return frozenset((write, has_arrived) for write, has_arrived in written if not has_arrived)
    return written


def _following(place: int, instruction: Instruction, labels: dict[str, int]) -> Iterator[int]:
    for target in instruction.targets:
        yield labels[target]
    always_leaves = (instruction.targets or END.match(instruction.text)) and not instruction.is_predicated
    if not always_leaves:
        yield place + 1


def _short(text: str) -> str:
    """The mnemonic."""
    return text.split(maxsplit=1)[0]


def _bodies(ptx: str) -> Iterator[str]:
    """The text between the braces of each kernel and function."""
    ptx = re.sub(r"//[^\n]*|/\*.*?\*/|^\s*\.(loc|file)\b[^\n]*", "", ptx, flags=re.M | re.S)
    for match in re.finditer(r"\.(?:entry|func)\b[^{;]*\{", ptx):
        depth, end = 1, match.end()
        while depth:
            brace = re.compile(r"[{}]").search(ptx, end)
            if brace is None:
                raise ValueError("the PTX has a brace that nothing closes")
            depth += 1 if brace.group() == "{" else -1
            end = brace.end()
        yield ptx[match.end() : end - 1]


def _parse(body: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions in order, and the index of each label. A label is only known within its braces."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str, list[str]]] = []
    scopes, num_scopes, place = [""], 0, 0
    token = re.compile(r"\s*(?:(?P<brace>[{}])|(?P<label>[$\w%]+)\s*:(?!:)|(?P<statement>[^;]+);)")
    while match := token.match(body, place):
        place = match.end()
        if match["brace"] == "{":
            num_scopes += 1
            scopes.append(f"{num_scopes}:")
        elif match["brace"] == "}":
            scopes.pop()
        elif match["label"]:
            labels[scopes[-1] + match["label"]] = len(instructions)
        elif not match["statement"].startswith("."):
            text = " ".join(match["statement"].split())
            predicate = re.match(r"@!?[%\w]+\s+", text)
            text = text[predicate.end() :] if predicate else text
            if jump := JUMP.match(text):
                jumps.append((len(instructions), jump.group(1), list(scopes)))
            elif text.startswith(("bra", "brx")):
                raise ValueError(f"unknown branch: {text}")
            instructions.append(Instruction(text, predicate is not None))
    if body[place:].strip():
        raise ValueError(f"not PTX: {body[place:].strip()[:80]}")
    for number, name, visible in jumps:
        target = next(scope + name for scope in reversed(visible) if scope + name in labels)
        instructions[number] = Instruction(instructions[number].text, instructions[number].is_predicated, (target,))
    return instructions, labels
