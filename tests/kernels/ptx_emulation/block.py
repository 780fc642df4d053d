"""One thread block: its registers, its shared memory, and a scheduler that runs all of its threads, instruction by
instruction, with numpy.

Asynchronous work is done as late as the program allows. A copy poisons its destination when it is issued and fills it
when the program has waited for it; a wgmma reads shared memory when it is waited for, and until then its accumulators
hold NaN. So a missing wait changes the result. Shared memory also remembers which thread wrote each byte by ordinary
stores, so that a read by TMA or wgmma without fence.proxy.async is an error.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.kernels.ptx_emulation.arithmetic import Arithmetic
from tests.kernels.ptx_emulation.asynchronous import Asynchronous
from tests.kernels.ptx_emulation.matrix import MatrixProducts
from tests.kernels.ptx_emulation.memory import PARAMETER_BASE, GlobalMemory, TensorMap
from tests.kernels.ptx_emulation.movement import Movement
from tests.kernels.ptx_emulation.parser import Instruction, Kernel
from tests.kernels.ptx_emulation.values import UNSIGNED, WIDTH, EmulationError
from tests.kernels.ptx_emulation.warps import Warps

POISON = 0xFF
"""Every byte of shared memory that nothing was written to: NaN in each of the types used."""
MAX_INSTRUCTIONS = 20_000_000
READY, AT_BARRIER, ENDED = range(3)

Compiled = Callable[[Any, np.ndarray], None]
"""An instruction: called with an index of registers and the numbers of the threads that run it."""


@dataclass(frozen=True)
class Schedule:
    """How threads take turns, and when asynchronous work is done."""

    seed: int = 0
    is_late: bool = True
    """Whether TMA copies land when they are waited for; otherwise at once."""
    is_skewed: bool = False
    """Whether random warps run ahead of the others; otherwise all threads stay together."""


class Block(Arithmetic, Movement, Asynchronous, Warps, MatrixProducts):
    """A thread block of `kernel`, ready to `run`."""

    def __init__(
        self,
        kernel: Kernel,
        parameters: np.ndarray,
        memory: GlobalMemory,
        tensor_maps: dict[int, TensorMap],
        index: tuple[int, int, int],
        grid: tuple[int, int, int],
        num_threads: int,
        dynamic_shared: int,
        schedule: Schedule,
    ) -> None:
        self.kernel, self.memory, self.tensor_maps = kernel, memory, tensor_maps
        self.parameters = parameters
        self.index, self.grid = index, grid
        self.num_threads = num_threads
        self.num_warps = -(-num_threads // 32)
        self.schedule = schedule
        self.random = np.random.default_rng(schedule.seed)
        self.registers = {
            name: np.zeros(num_threads, bool if kind == "pred" else UNSIGNED[WIDTH[kind]])
            for name, kind in kernel.registers.items()
        }
        self.position = np.zeros(num_threads, np.int64)
        self.state = np.full(num_threads, READY, np.int8)
        self.barrier = np.zeros(num_threads, np.int64)
        self.barrier_size = np.zeros(num_threads, np.int64)
        self.asleep_until = np.zeros(num_threads, np.int64)
        """By thread, the step before which others run first: it has waited for something that was not done."""
        self.num_steps = 0
        self.shared = np.full(max(kernel.shared_bytes + dynamic_shared, 16), POISON, np.uint8)
        self.unfenced_writer = np.zeros(self.shared.size, np.int16)
        """By byte of shared memory: 1 + the thread that wrote it by the generic proxy, with no fence since; 0: none."""
        self.is_synchronised = np.zeros(self.shared.size, bool)
        """Which of these writes a barrier of all threads has followed, so that any thread may fence them."""
        self.num_readers = np.zeros(self.shared.size, np.int32)
        """By byte: products in flight that read it."""
        self.current = kernel.instructions[0]
        Asynchronous.__init__(self)
        MatrixProducts.__init__(self)
        self.code = [self._compile(instruction) for instruction in kernel.instructions]

    # ---- Operands ----------------------------------------------------------------------------------------------------

    def reader(self, operand: str, width: int) -> Callable[[Any], Any]:
        """Bits of an operand, as unsigned integers of `width` bits."""
        kind = UNSIGNED[width]
        if operand in self.registers:
            register = self.registers[operand]
            if register.dtype in (bool, kind):
                return lambda select: register[select]
            return lambda select: register[select].astype(kind)
        if found := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", operand):
            return _constant(kind(int(found[1], 16)))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            return _constant(kind(int(operand.rstrip("U"), 0) & ((1 << width) - 1)))
        if operand.startswith("%"):
            special = self._special(operand)
            if isinstance(special, np.ndarray):
                numbers = special.astype(kind)
                return lambda select: numbers[select]
            return _constant(kind(special))
        if operand in self.kernel.extern_shared:
            return _constant(kind(self.kernel.shared_bytes))
        if operand in self.kernel.shared_symbols:
            return _constant(kind(self.kernel.shared_symbols[operand]))
        if operand in self.kernel.parameters:
            return _constant(kind(PARAMETER_BASE + self.kernel.parameters[operand].offset))
        raise EmulationError(f"operand {operand}")

    def float_reader(self, operand: str) -> Callable[[Any], Any]:
        bits = self.reader(operand, 32)
        return lambda select: np.asarray(bits(select)).view(np.float32)

    def predicate_reader(self, operand: str) -> Callable[[Any], Any]:
        register = self.registers[operand.removeprefix("!")]
        if operand.startswith("!"):
            return lambda select: ~register[select]
        return lambda select: register[select]

    def is_predicate(self, operand: str) -> bool:
        return operand in self.registers and self.registers[operand].dtype == bool

    def writer(self, operand: str) -> Callable[[Any, Any], None]:
        if operand == "_":
            return lambda select, values: None
        register = self.registers[operand]

        def write(select: Any, values: Any) -> None:
            register[select] = values

        return write

    def addresses(self, operand: str, width: int | None = None) -> Callable[[Any, np.ndarray], np.ndarray]:
        """Of an operand like [%rd1+16]: int64, one for each thread that runs the instruction."""
        base, offset = self.base_and_offset(operand)
        if width is None:
            width = 64 if base in self.registers and self.registers[base].dtype == np.uint64 else 32
        bits = self.reader(base, width)
        return lambda select, threads: np.broadcast_to(
            np.asarray(bits(select)).astype(np.int64) + offset, (threads.size,)
        )

    def base_and_offset(self, operand: str) -> tuple[str, int]:
        found = re.fullmatch(r"\[\s*([%$\w.@]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if found is None:
            raise EmulationError(f"address {operand}")
        return found[1], int(found[2] or "0", 0)

    def _special(self, name: str) -> Any:
        threads = np.arange(self.num_threads)
        axes = dict(zip("xyz", range(3), strict=True))
        kind, _, axis = name[1:].partition(".")
        if kind in ("ctaid", "nctaid"):
            return (self.index if kind == "ctaid" else self.grid)[axes[axis]]
        one_block_clusters = {"cluster_ctarank": 0, "cluster_ctaid": 0, "smid": 0, "clock": 0}
        blocks = {"tid": threads if axis == "x" else 0, "ntid": self.num_threads if axis == "x" else 1}
        table = {**blocks, **one_block_clusters, "laneid": threads % 32, "warpid": threads // 32}
        if kind not in table:
            raise EmulationError(f"special register {name}")
        return table[kind]

    def _compile(self, instruction: Instruction) -> Compiled:
        try:
            return getattr(self, f"op_{instruction.op}")(instruction)
        except (EmulationError, KeyError, StopIteration, IndexError, AttributeError, ValueError, TypeError) as error:
            # An instruction that the emulator does not know matters only if it is reached.
            reason = f"not emulated: {instruction.text} ({error!r})"

            def fail(select: Any, threads: np.ndarray) -> None:
                raise EmulationError(reason)

            return fail

    # ---- Scheduling --------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run all threads to their end; the number of instructions issued. Raises EmulationError for any fault."""
        ahead: np.ndarray | None = None
        warps = np.arange(self.num_threads) // 32
        while True:
            ready = self.state == READY
            awake = ready & (self.asleep_until <= self.num_steps)
            ready = awake if awake.any() else ready
            if not ready.any():
                if (self.state == ENDED).all():
                    break
                raise EmulationError(f"deadlock at {self._where()}")
            if self.schedule.is_skewed:
                if ahead is None or not (ready & ahead).any() or self.random.random() < 0.02:
                    several = int(self.random.integers(1, self.num_warps + 1))
                    ahead = np.isin(warps, self.random.choice(np.unique(warps[ready]), size=several))
                ready = ready & ahead
            position = int(self.position[ready].min())
            self._issue(position, np.flatnonzero(ready & (self.position == position)))
        self.check_products_are_done()
        self.finish_stores()
        return self.num_steps

    def _issue(self, position: int, threads: np.ndarray) -> None:
        self.num_steps += 1
        if self.num_steps > MAX_INSTRUCTIONS:
            raise EmulationError(f"more than {MAX_INSTRUCTIONS} instructions; the kernel is at {self._where()}")
        instruction = self.current = self.kernel.instructions[position]
        self.position[threads] = position + 1
        if instruction.predicate is not None:
            is_on = self.registers[instruction.predicate][threads]
            threads = threads[~is_on if instruction.is_negated else is_on]
        if instruction.op == "bra":
            self.position[threads] = instruction.target
        elif threads.size:
            select = slice(None) if threads.size == self.num_threads else threads
            self.code[position](select, threads)

    def _where(self) -> str:
        positions = np.unique(self.position[self.state != ENDED])[:4]
        return "; ".join(self.kernel.instructions[p - 1].text for p in positions)

    def arrive_at_barrier(self, number: int, size: int, threads: np.ndarray, waits: bool = True) -> None:
        if waits:
            self.state[threads] = AT_BARRIER
        else:
            raise EmulationError(f"not emulated: {self.current.text}")
        self.barrier[threads], self.barrier_size[threads] = number, size
        here = (self.state == AT_BARRIER) & (self.barrier == number)
        if int(here.sum()) > size or (self.barrier_size[here] != size).any():
            raise EmulationError(f"barrier {number} is waited for by other threads than it counts: {self.current.text}")
        if int(here.sum()) == size:
            self.state[here] = READY
            if size == self.num_threads:
                self.is_synchronised = self.unfenced_writer > 0

    # ---- Shared memory -----------------------------------------------------------------------------------------------

    def load_shared(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """uint8 [n, size] by ordinary loads."""
        return self.shared[self._bytes_at(addresses, size)]

    def store_shared(self, addresses: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        """Ordinary stores of uint8 [n, size]."""
        where = self._bytes_at(addresses, values.shape[1])
        self.check_no_reader(where)
        self.shared[where] = values
        self.unfenced_writer[where] = threads[:, None] + 1
        self.is_synchronised[where] = False

    def check_no_reader(self, where: np.ndarray) -> None:
        if self.num_readers[where].any():
            raise EmulationError(f"shared memory is overwritten that a product in flight reads: {self.current.text}")

    def check_fenced(self, where: np.ndarray) -> None:
        """Raise EmulationError unless a fence is between ordinary stores to these bytes and their asynchronous read."""
        if self.unfenced_writer[where].any():
            raise EmulationError(f"fence.proxy.async is missing before {self.current.text}")

    def _bytes_at(self, addresses: np.ndarray, size: int) -> np.ndarray:
        if addresses.min() < 0 or addresses.max() + size > self.shared.size:
            raise EmulationError(f"access beyond the {self.shared.size} bytes of shared memory: {self.current.text}")
        if (addresses % size).any():
            raise EmulationError(f"misaligned access to shared memory: {self.current.text}")
        return addresses[:, None] + np.arange(size)


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda select: value


def launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    parameters: bytes,
    memory: GlobalMemory,
    tensor_maps: dict[int, TensorMap],
    num_threads: int,
    dynamic_shared: int,
    schedule: Schedule,
) -> int:
    """Run every block of the grid, one after another; the number of instructions issued."""
    space = np.zeros(kernel.parameter_bytes, np.uint8)
    space[: len(parameters)] = np.frombuffer(parameters, np.uint8)
    num_steps = 0
    for number in range(grid[0] * grid[1] * grid[2]):
        index = (number % grid[0], number // grid[0] % grid[1], number // (grid[0] * grid[1]))
        own = Schedule(schedule.seed + number, schedule.is_late, schedule.is_skewed)
        arguments = (kernel, space, memory, tensor_maps, index, grid, num_threads, dynamic_shared, own)
        num_steps += Block(*arguments).run()
    return num_steps
