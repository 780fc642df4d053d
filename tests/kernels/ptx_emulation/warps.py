"""Instructions between threads: barriers, shuffles, votes, reductions, ldmatrix and stmatrix, branches by table."""

import re
from typing import Any

import numpy as np

from tests.kernels.ptx_emulation.parser import Instruction, vector
from tests.kernels.ptx_emulation.values import EmulationError

_REDUCTIONS = {
    "min": np.minimum,
    "max": np.maximum,
    "add": np.add,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def warps_of(threads: np.ndarray) -> np.ndarray:
    return np.unique(threads // 32)


class Warps:
    """Part of a Block."""

    def op_bar(self: Any, instruction: Instruction) -> Any:
        if "warp" in instruction.modifiers:
            return lambda select, threads: None
        arguments = instruction.arguments
        number = int(arguments[0], 0) if arguments else 0
        size = int(arguments[1], 0) if len(arguments) > 1 else self.num_threads
        waits = "arrive" not in instruction.modifiers
        return lambda select, threads: self.arrive_at_barrier(number, size, threads, waits)

    op_barrier = op_bar

    def op_brx(self: Any, instruction: Instruction) -> Any:
        choice = self.reader(instruction.arguments[0], 32)
        table = self.kernel.branch_tables[instruction.arguments[1]]
        targets = np.array([self.kernel.labels[label] for label in table])

        def run(select: Any, threads: np.ndarray) -> None:
            self.position[threads] = targets[np.broadcast_to(choice(select), (threads.size,)).astype(np.int64)]

        return run

    def op_ret(self: Any, instruction: Instruction) -> Any:
        def run(select: Any, threads: np.ndarray) -> None:
            self.state[threads] = 2

        return run

    op_exit = op_ret

    def op_trap(self: Any, instruction: Instruction) -> Any:
        def run(select: Any, threads: np.ndarray) -> None:
            raise EmulationError("the kernel traps")

        return run

    def op_elect(self: Any, instruction: Instruction) -> Any:
        is_elected = self.writer(instruction.arguments[0].split("|")[1])

        def run(select: Any, threads: np.ndarray) -> None:
            first = np.zeros(threads.size, bool)
            first[np.unique(threads // 32, return_index=True)[1]] = True
            is_elected(select, first)

        return run

    def op_shfl(self: Any, instruction: Instruction) -> Any:
        mode = next(m for m in instruction.modifiers if m in ("bfly", "idx", "up", "down"))
        target, *is_valid = map(self.writer, instruction.arguments[0].split("|"))
        source, by, limits = (self.reader(operand, 32) for operand in instruction.arguments[1:4])

        def run(select: Any, threads: np.ndarray) -> None:
            lane = threads % 32
            step = np.broadcast_to(np.asarray(by(select)).astype(np.int64), (threads.size,))
            limit = np.broadcast_to(np.asarray(limits(select)).astype(np.int64), (threads.size,))
            mask, clamp = (limit >> 8) & 31, limit & 31
            last = (lane & mask) | (clamp & ~mask)
            if mode == "up":
                other = lane - step
                is_inside = other >= last
            else:
                other = {"bfly": lane ^ step, "idx": (lane & mask) | (step & ~mask), "down": lane + step}[mode]
                is_inside = other <= last
            from_thread = threads - lane + np.where(is_inside, other, lane)
            takes_part = np.zeros(self.num_threads, bool)
            takes_part[threads] = True
            if not takes_part[from_thread].all():
                raise EmulationError(f"a lane is read that takes no part: {instruction.text}")
            values = np.broadcast_to(np.asarray(source(slice(None))), (self.num_threads,)).copy()
            target(select, values[from_thread])
            for write in is_valid:
                write(select, is_inside)

        return run

    def op_redux(self: Any, instruction: Instruction) -> Any:
        how = next(_REDUCTIONS[m] for m in instruction.modifiers if m in _REDUCTIONS)
        kind = np.int32 if instruction.types[-1][0] == "s" else np.uint32
        target, source = self.writer(instruction.arguments[0]), self.reader(instruction.arguments[1], 32)

        def run(select: Any, threads: np.ndarray) -> None:
            values = np.broadcast_to(np.asarray(source(select)), (threads.size,)).view(kind)
            reduced = np.empty(threads.size, np.uint32)
            for warp in warps_of(threads):
                own = threads // 32 == warp
                reduced[own] = np.asarray(how.reduce(values[own])).view(np.uint32)
            target(select, reduced)

        return run

    def op_vote(self: Any, instruction: Instruction) -> Any:
        how = next(m for m in instruction.modifiers if m in ("all", "any", "ballot"))
        target, source = self.writer(instruction.arguments[0]), self.predicate_reader(instruction.arguments[1])

        def run(select: Any, threads: np.ndarray) -> None:
            is_set = np.broadcast_to(np.asarray(source(select)), (threads.size,))
            result = np.empty(threads.size, np.uint32 if how == "ballot" else bool)
            for warp in warps_of(threads):
                own = threads // 32 == warp
                if how == "ballot":
                    result[own] = np.bitwise_or.reduce(
                        np.uint32(1) << (threads[own][is_set[own]] % 32).astype(np.uint32)
                    )
                else:
                    result[own] = is_set[own].all() if how == "all" else is_set[own].any()
            target(select, result)

        return run

    def op_activemask(self: Any, instruction: Instruction) -> Any:
        target = self.writer(instruction.arguments[0])

        def run(select: Any, threads: np.ndarray) -> None:
            active = np.zeros(self.num_threads, np.uint32)
            np.bitwise_or.at(active, threads // 32 * 32, np.uint32(1) << (threads % 32).astype(np.uint32))
            target(select, active[threads // 32 * 32])

        return run

    # ---- Matrices of 8 x 8 between shared memory and the registers of a warp -----------------------------------------

    def op_ldmatrix(self: Any, instruction: Instruction) -> Any:
        count, is_transposed = _matrices(instruction)
        targets = [self.writer(name) for name in vector(instruction.arguments[0])]
        address = self.addresses(instruction.arguments[1], 32)

        def run(select: Any, threads: np.ndarray) -> None:
            for warp in warps_of(threads):
                lanes = np.arange(32 * warp, 32 * warp + 32)
                rows_at = address(lanes, lanes)
                for number in range(count):
                    rows = self.load_shared(rows_at[8 * number : 8 * number + 8], 16).view(np.uint16).reshape(8, 8)
                    rows = np.ascontiguousarray(rows.T if is_transposed else rows).reshape(8, 4, 2).astype(np.uint32)
                    targets[number](lanes, (rows[..., 0] | rows[..., 1] << np.uint32(16)).reshape(32))

        return run

    def op_stmatrix(self: Any, instruction: Instruction) -> Any:
        count, is_transposed = _matrices(instruction)
        sources = [self.reader(name, 32) for name in vector(instruction.arguments[1])]
        address = self.addresses(instruction.arguments[0], 32)

        def run(select: Any, threads: np.ndarray) -> None:
            for warp in warps_of(threads):
                lanes = np.arange(32 * warp, 32 * warp + 32)
                rows_at = address(lanes, lanes)
                for number in range(count):
                    pairs = np.asarray(sources[number](lanes)).reshape(8, 4)
                    rows = np.stack([pairs & 0xFFFF, pairs >> 16], -1).astype(np.uint16).reshape(8, 8)
                    rows = np.ascontiguousarray(rows.T if is_transposed else rows)
                    own = slice(8 * number, 8 * number + 8)
                    self.store_shared(rows_at[own], rows.view(np.uint8).reshape(8, 16), lanes[own])

        return run


def _matrices(instruction: Instruction) -> tuple[int, bool]:
    count = next(int(m[1:]) for m in instruction.modifiers if re.fullmatch(r"x\d", m))
    return count, "trans" in instruction.modifiers
