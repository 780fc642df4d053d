"""Instructions that move and convert values: mov, cvt, cvta, and loads and stores of each memory space."""

from typing import Any

import numpy as np

from tests.kernels.ptx_emulation.memory import PARAMETER_BASE, SHARED_BASE
from tests.kernels.ptx_emulation.parser import Instruction, vector
from tests.kernels.ptx_emulation.values import SIGNED, UNSIGNED, WIDTH, EmulationError, from_float32, to_float32

_SPACES = ("global", "shared", "param", "local", "const")


class Movement:
    """Part of a Block."""

    def op_mov(self: Any, instruction: Instruction) -> Any:
        kind = instruction.types[-1]
        to, of = instruction.arguments
        width = WIDTH[kind]
        if kind == "pred":
            target = self.writer(to)
            if self.is_predicate(of.removeprefix("!")):
                source = self.predicate_reader(of)
                return lambda select, threads: target(select, source(select))
            value = bool(int(of, 0))
            return lambda select, threads: target(select, value)
        if of.startswith("{"):
            return self._pack(to, vector(of), width)
        if to.startswith("{"):
            return self._unpack(vector(to), of, width)
        source, target = self.reader(of, width), self.writer(to)
        return lambda select, threads: target(select, source(select))

    def _pack(self: Any, to: str, parts: list[str], width: int) -> Any:
        number, step = UNSIGNED[width], width // len(parts)
        sources, target = [self.reader(part, step) for part in parts], self.writer(to)

        def run(select: Any, threads: np.ndarray) -> None:
            value = number(0)
            for place, source in enumerate(sources):
                value = value | np.asarray(source(select)).astype(number) << number(place * step)
            target(select, value)

        return run

    def _unpack(self: Any, parts: list[str], of: str, width: int) -> Any:
        number, step = UNSIGNED[width], width // len(parts)
        source, targets = self.reader(of, width), [self.writer(part) for part in parts]

        def run(select: Any, threads: np.ndarray) -> None:
            value = np.asarray(source(select))
            for place, target in enumerate(targets):
                target(select, (value >> number(place * step)).astype(UNSIGNED[step]))

        return run

    def op_cvta(self: Any, instruction: Instruction) -> Any:
        target, source = self.writer(instruction.arguments[0]), self.reader(instruction.arguments[1], 64)
        base = np.uint64(SHARED_BASE if "shared" in instruction.modifiers else 0)
        if "to" in instruction.modifiers:
            return lambda select, threads: target(select, source(select) - base)
        return lambda select, threads: target(select, source(select) + base)

    def op_mapa(self: Any, instruction: Instruction) -> Any:
        """Addresses within a cluster of one block are the block's own."""
        width = WIDTH[instruction.types[-1]]
        target, source = self.writer(instruction.arguments[0]), self.reader(instruction.arguments[1], width)
        return lambda select, threads: target(select, source(select))

    def op_cvt(self: Any, instruction: Instruction) -> Any:
        to, *of = instruction.types
        target, operand = self.writer(instruction.arguments[0]), instruction.arguments[1]
        if to in ("bf16x2", "f16x2"):
            high, low = (self.float_reader(name) for name in instruction.arguments[1:3])

            def pack(select: Any, threads: np.ndarray) -> None:
                upper, lower = (
                    from_float32(to[:-2], np.broadcast_to(read(select), (threads.size,))).astype(np.uint32)
                    for read in (high, low)
                )
                target(select, upper << np.uint32(16) | lower)

            return pack
        [of] = of
        if of == "f32":
            return self._from_float32(instruction, to)
        if of in ("bf16", "f16") and to == "f32":
            bits = self.reader(operand, 16)
            return lambda select, threads: target(
                select, to_float32(of, np.atleast_1d(np.asarray(bits(select)))).view(np.uint32)
            )
        if to == "f32":
            number = self._typed_reader(operand, of)
            return lambda select, threads: target(select, np.asarray(number(select)).astype(np.float32).view(np.uint32))
        if WIDTH[of] > 64 or to[0] not in "sub" or of[0] not in "sub":
            raise EmulationError(f"cvt from {of} to {to}")
        return self._between_integers(instruction, to, of)

    def _from_float32(self: Any, instruction: Instruction, to: str) -> Any:
        target, source = self.writer(instruction.arguments[0]), self.float_reader(instruction.arguments[1])
        if to in ("bf16", "f16"):
            return lambda select, threads: target(select, from_float32(to, np.atleast_1d(source(select))))
        is_truncated = "rzi" in instruction.modifiers
        round_ = np.trunc if is_truncated else np.rint
        if to == "f32":
            return lambda select, threads: target(select, np.asarray(round_(source(select))).view(np.uint32))
        if to[0] not in "su":
            raise EmulationError(f"cvt from f32 to {to}")
        number = (SIGNED if to[0] == "s" else UNSIGNED)[WIDTH[to]]

        def run(select: Any, threads: np.ndarray) -> None:
            rounded = round_(source(select).astype(np.float64)).astype(np.int64)
            target(select, rounded.astype(number).view(UNSIGNED[WIDTH[to]]))

        return run

    def _between_integers(self: Any, instruction: Instruction, to: str, of: str) -> Any:
        # Registers have 16 bits at least, of which an 8-bit type is the lower half.
        from_width, to_width = WIDTH[of], max(WIDTH[to], 16)
        target, source = (
            self.writer(instruction.arguments[0]),
            self.reader(instruction.arguments[1], max(from_width, 16)),
        )

        def run(select: Any, threads: np.ndarray) -> None:
            value = np.asarray(source(select)).astype(UNSIGNED[from_width])
            if of[0] == "s":
                value = value.view(SIGNED[from_width]).astype(np.int64).view(np.uint64)
            target(select, value.astype(UNSIGNED[to_width]))

        return run

    # ---- Loads and stores --------------------------------------------------------------------------------------------

    def op_ld(self: Any, instruction: Instruction) -> Any:
        targets = [self.writer(name) for name in vector(instruction.arguments[0])]
        kind = instruction.types[-1]
        size = WIDTH[kind] // 8 * len(targets)
        space = next((m for m in instruction.modifiers if m in _SPACES), "generic")
        base, offset = self.base_and_offset(instruction.arguments[1])

        def put(select: Any, data: np.ndarray) -> None:
            elements = data.reshape(len(data), len(targets), WIDTH[kind] // 8)
            for place, target in enumerate(targets):
                value = np.ascontiguousarray(elements[:, place]).view(UNSIGNED[WIDTH[kind]])[:, 0]
                if WIDTH[kind] == 8:  # extended to the register
                    value = value.view(np.int8).astype(np.int16).view(np.uint16) if kind[0] == "s" else value
                target(select, value)

        if space == "param":
            by_register = self.reader(base, 64) if base in self.registers else None
            fixed = None if by_register else self.kernel.parameters[base].offset + offset

            def from_parameters(select: Any, threads: np.ndarray) -> None:
                start = fixed
                if by_register is not None:
                    start = int(np.asarray(by_register(select)).flat[0]) - PARAMETER_BASE + offset
                put(select, np.broadcast_to(self.parameters[start : start + size], (threads.size, size)))

            return from_parameters
        if space == "global":
            address = self.addresses(instruction.arguments[1], 64)
            return lambda select, threads: put(select, self.memory.read(address(select, threads), size))
        if space == "shared":
            address = self.addresses(instruction.arguments[1], 32)
            return lambda select, threads: put(select, self.load_shared(address(select, threads), size))
        raise EmulationError(f"load from {space} memory")

    def op_st(self: Any, instruction: Instruction) -> Any:
        width = WIDTH[instruction.types[-1]]
        sources = [self.reader(name, max(width, 16)) for name in vector(instruction.arguments[1])]
        space = next((m for m in instruction.modifiers if m in _SPACES), "generic")
        if space not in ("global", "shared"):
            raise EmulationError(f"store to {space} memory")
        address = self.addresses(instruction.arguments[0], 64 if space == "global" else 32)

        def run(select: Any, threads: np.ndarray) -> None:
            values = [np.broadcast_to(np.asarray(source(select)), (threads.size,)) for source in sources]
            columns = [np.ascontiguousarray(value.astype(UNSIGNED[width])) for value in values]
            data = np.concatenate([column.view(np.uint8).reshape(threads.size, -1) for column in columns], axis=1)
            if space == "global":
                self.memory.write(address(select, threads), data)
            else:
                self.store_shared(address(select, threads), data, threads)

        return run

    def op_atom(self: Any, instruction: Instruction) -> Any:
        raise EmulationError("atomics: no kernel of the project uses them")

    op_red = op_atom

    # ---- Hints, which change no value --------------------------------------------------------------------------------

    def op_nop(self: Any, instruction: Instruction) -> Any:
        return lambda select, threads: None

    op_membar = op_setmaxnreg = op_griddepcontrol = op_prefetch = op_prefetchu = op_nanosleep = op_nop
