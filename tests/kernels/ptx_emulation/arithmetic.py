"""Integer, logical and floating-point instructions of PTX, on arrays with one element for each thread.

Float32 is rounded after each operation; fma is computed in float64 and rounded once. ex2, lg2, rcp and rsqrt give the
exact results, rounded: a GPU's approximations may differ in the last bit or two.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.kernels.ptx_emulation.parser import Instruction
from tests.kernels.ptx_emulation.values import SIGNED, UNSIGNED, WIDTH, EmulationError, from_float32, to_float32

_SMALLEST_NORMAL = np.float32(2.0**-126)
_ORDERED = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
_INTEGER = _ORDERED | {
    "ne": np.not_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal
}  # fmt: skip
_FLOAT = _ORDERED | {
    "ne": lambda x, y: (x < y) | (x > y),
    "neu": np.not_equal,
    "equ": lambda x, y: ~((x < y) | (x > y)),
    "ltu": lambda x, y: ~(x >= y),
    "leu": lambda x, y: ~(x > y),
    "gtu": lambda x, y: ~(x <= y),
    "geu": lambda x, y: ~(x < y),
    "nan": lambda x, y: np.isnan(x) | np.isnan(y),
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
}


class Arithmetic:
    """Part of a Block."""

    def op_add(self: Any, instruction: Instruction) -> Any:
        return self._binary(instruction, lambda x, y: x + y, lambda x, y: x + y)

    def op_sub(self: Any, instruction: Instruction) -> Any:
        return self._binary(instruction, lambda x, y: x - y, lambda x, y: x - y)

    def op_and(self: Any, instruction: Instruction) -> Any:
        return self._binary(instruction, lambda x, y: x & y)

    def op_or(self: Any, instruction: Instruction) -> Any:
        return self._binary(instruction, lambda x, y: x | y)

    def op_xor(self: Any, instruction: Instruction) -> Any:
        return self._binary(instruction, lambda x, y: x ^ y)

    def op_max(self: Any, instruction: Instruction) -> Any:
        return self._binary(instruction, np.maximum, np.maximum if "NaN" in instruction.modifiers else np.fmax)

    def op_min(self: Any, instruction: Instruction) -> Any:
        return self._binary(instruction, np.minimum, np.minimum if "NaN" in instruction.modifiers else np.fmin)

    def op_div(self: Any, instruction: Instruction) -> Any:
        return self._binary(instruction, _quotient, lambda x, y: x / y)

    def op_rem(self: Any, instruction: Instruction) -> Any:
        return self._binary(instruction, lambda x, y: x - _quotient(x, y) * y)

    def op_mul(self: Any, instruction: Instruction) -> Any:
        if "wide" in instruction.modifiers or "hi" in instruction.modifiers:
            return self._wide_product(instruction)
        return self._binary(instruction, lambda x, y: x * y, lambda x, y: x * y)

    def op_mad(self: Any, instruction: Instruction) -> Any:
        if "wide" in instruction.modifiers:
            return self._wide_product(instruction)
        width = WIDTH[instruction.types[-1]]
        target = self.writer(instruction.arguments[0])
        x, y, z = (self.reader(operand, width) for operand in instruction.arguments[1:4])

        def run(select: Any, threads: np.ndarray) -> None:
            with np.errstate(all="ignore"):
                target(select, x(select) * y(select) + z(select))

        return run

    def op_fma(self: Any, instruction: Instruction) -> Any:
        kind = instruction.types[-1]
        target = self.writer(instruction.arguments[0])
        if kind == "f32":
            x, y, z = (self.float_reader(operand) for operand in instruction.arguments[1:4])

            def run(select: Any, threads: np.ndarray) -> None:
                with np.errstate(all="ignore"):
                    result = x(select).astype(np.float64) * y(select) + z(select)
                    target(select, result.astype(np.float32).view(np.uint32))

            return run
        if kind not in ("bf16x2", "f16x2"):
            raise EmulationError(f"fma of {kind}")
        operands = [self.reader(operand, 32) for operand in instruction.arguments[1:4]]

        def run_pairs(select: Any, threads: np.ndarray) -> None:
            pairs = [np.broadcast_to(np.asarray(read(select)), (threads.size,)) for read in operands]
            result = np.zeros(threads.size, np.uint32)
            for shift in (np.uint32(0), np.uint32(16)):
                x, y, z = (to_float32(kind[:-2], (pair >> shift).astype(np.uint16)) for pair in pairs)
                with np.errstate(all="ignore"):
                    result |= from_float32(kind[:-2], x * y + z).astype(np.uint32) << shift
            target(select, result)

        return run_pairs

    def op_neg(self: Any, instruction: Instruction) -> Any:
        kind = instruction.types[-1]
        if kind == "f32":
            return self._unary(instruction, np.negative)
        number = UNSIGNED[WIDTH[kind]]
        target, x = self.writer(instruction.arguments[0]), self.reader(instruction.arguments[1], WIDTH[kind])

        def run(select: Any, threads: np.ndarray) -> None:
            with np.errstate(all="ignore"):
                target(select, number(0) - x(select))

        return run

    def op_not(self: Any, instruction: Instruction) -> Any:
        kind, operand = instruction.types[-1], instruction.arguments[1]
        target = self.writer(instruction.arguments[0])
        x = self.predicate_reader(operand) if kind == "pred" else self.reader(operand, WIDTH[kind])
        return lambda select, threads: target(select, ~np.asarray(x(select)))

    def op_abs(self: Any, instruction: Instruction) -> Any:
        return self._unary(instruction, np.abs)

    def op_ex2(self: Any, instruction: Instruction) -> Any:
        def power(x: np.ndarray) -> np.ndarray:
            result = np.exp2(x.astype(np.float64)).astype(np.float32)
            return np.where(result < _SMALLEST_NORMAL, 0, result) if "ftz" in instruction.modifiers else result

        return self._unary(instruction, power)

    def op_lg2(self: Any, instruction: Instruction) -> Any:
        return self._unary(instruction, lambda x: np.log2(x.astype(np.float64)))

    def op_rcp(self: Any, instruction: Instruction) -> Any:
        return self._unary(instruction, lambda x: 1 / x)

    def op_rsqrt(self: Any, instruction: Instruction) -> Any:
        return self._unary(instruction, lambda x: 1 / np.sqrt(x.astype(np.float64)))

    def op_sqrt(self: Any, instruction: Instruction) -> Any:
        return self._unary(instruction, np.sqrt)

    def op_setp(self: Any, instruction: Instruction) -> Any:
        kind, comparison = instruction.types[-1], instruction.modifiers[0]
        targets = [self.writer(name) for name in instruction.arguments[0].split("|")]
        x, y = (self._typed_reader(operand, kind) for operand in instruction.arguments[1:3])
        compare = (_FLOAT if kind == "f32" else _INTEGER)[comparison]
        join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(instruction.modifiers[1])
        other = self.predicate_reader(instruction.arguments[3]) if len(instruction.arguments) > 3 else None

        def run(select: Any, threads: np.ndarray) -> None:
            with np.errstate(all="ignore"):
                result = compare(x(select), y(select))
            results = [result, ~np.asarray(result)]
            if other is not None:
                results = [join(value, other(select)) for value in results]
            for target, value in zip(targets, results, strict=False):
                target(select, value)

        return run

    def op_selp(self: Any, instruction: Instruction) -> Any:
        width = WIDTH[instruction.types[-1]]
        target = self.writer(instruction.arguments[0])
        x, y = (self.reader(operand, width) for operand in instruction.arguments[1:3])
        condition = self.predicate_reader(instruction.arguments[3])
        return lambda select, threads: target(select, np.where(condition(select), x(select), y(select)))

    # ---- Bits --------------------------------------------------------------------------------------------------------

    def op_shl(self: Any, instruction: Instruction) -> Any:
        width = WIDTH[instruction.types[-1]]
        number = UNSIGNED[width]
        target = self.writer(instruction.arguments[0])
        x, by = self.reader(instruction.arguments[1], width), self.reader(instruction.arguments[2], 32)

        def run(select: Any, threads: np.ndarray) -> None:
            places = np.asarray(by(select))
            shifted = x(select) << np.minimum(places, width - 1).astype(number)
            target(select, np.where(places >= width, number(0), shifted))

        return run

    def op_shr(self: Any, instruction: Instruction) -> Any:
        kind = instruction.types[-1]
        width = WIDTH[kind]
        number = UNSIGNED[width]
        target = self.writer(instruction.arguments[0])
        x, by = self.reader(instruction.arguments[1], width), self.reader(instruction.arguments[2], 32)

        def run(select: Any, threads: np.ndarray) -> None:
            places = np.asarray(by(select))
            least = np.minimum(places, width - 1)
            if kind[0] == "s":
                signed = SIGNED[width]
                target(select, (np.asarray(x(select)).view(signed) >> least.astype(signed)).view(number))
            else:
                target(select, np.where(places >= width, number(0), np.asarray(x(select)) >> least.astype(number)))

        return run

    def op_shf(self: Any, instruction: Instruction) -> Any:
        target = self.writer(instruction.arguments[0])
        low, high, by = (self.reader(operand, 32) for operand in instruction.arguments[1:4])
        is_left, wraps = "l" in instruction.modifiers, "wrap" in instruction.modifiers

        def run(select: Any, threads: np.ndarray) -> None:
            both = _wide(high(select)) << np.uint64(32) | _wide(low(select))
            places = _wide(by(select)) & np.uint64(31) if wraps else np.minimum(_wide(by(select)), np.uint64(32))
            shifted = (both << places) >> np.uint64(32) if is_left else both >> places
            target(select, shifted.astype(np.uint32))

        return run

    def op_bfe(self: Any, instruction: Instruction) -> Any:
        target = self.writer(instruction.arguments[0])
        x, start, size = (self.reader(operand, 32) for operand in instruction.arguments[1:4])
        is_signed = instruction.types[-1][0] == "s"

        def run(select: Any, threads: np.ndarray) -> None:
            num_bits = _wide(size(select))
            mask = (np.uint64(1) << num_bits) - np.uint64(1)
            field = (_wide(x(select)) >> _wide(start(select))) & mask
            if is_signed:
                sign = (field >> (num_bits - np.uint64(1))) & np.uint64(1)
                field = field | np.where(sign == 1, ~mask, np.uint64(0))
            target(select, field.astype(np.uint32))

        return run

    def op_bfi(self: Any, instruction: Instruction) -> Any:
        target = self.writer(instruction.arguments[0])
        field, into, start, size = (self.reader(operand, 32) for operand in instruction.arguments[1:5])

        def run(select: Any, threads: np.ndarray) -> None:
            at = _wide(start(select))
            mask = ((np.uint64(1) << _wide(size(select))) - np.uint64(1)) << at
            target(select, ((_wide(into(select)) & ~mask) | ((_wide(field(select)) << at) & mask)).astype(np.uint32))

        return run

    def op_prmt(self: Any, instruction: Instruction) -> Any:
        target = self.writer(instruction.arguments[0])
        low, high, choice = (self.reader(operand, 32) for operand in instruction.arguments[1:4])

        def run(select: Any, threads: np.ndarray) -> None:
            both = _wide(high(select)) << np.uint64(32) | _wide(low(select))
            chosen, result = _wide(choice(select)), np.uint64(0)
            for place in range(4):
                which = (chosen >> np.uint64(4 * place)) & np.uint64(15)
                byte = (both >> ((which & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
                sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
                byte = np.where(which & np.uint64(8), sign, byte)
                result = result | byte << np.uint64(8 * place)
            target(select, np.asarray(result).astype(np.uint32))

        return run

    def op_lop3(self: Any, instruction: Instruction) -> Any:
        target = self.writer(instruction.arguments[0])
        operands = [self.reader(operand, 32) for operand in instruction.arguments[1:4]]
        table = int(instruction.arguments[4], 0)

        def run(select: Any, threads: np.ndarray) -> None:
            x, y, z = (np.asarray(read(select)) for read in operands)
            result = np.uint32(0)
            for entry in range(8):
                if table >> entry & 1:
                    terms = (x if entry & 4 else ~x), (y if entry & 2 else ~y), (z if entry & 1 else ~z)
                    result = result | (terms[0] & terms[1] & terms[2])
            target(select, result)

        return run

    # ---- Shared by several instructions ------------------------------------------------------------------------------

    def _typed_reader(self: Any, operand: str, kind: str) -> Callable[[Any], Any]:
        """Values of an operand as numbers of its type."""
        if kind == "f32":
            return self.float_reader(operand)
        if kind == "pred":
            return self.predicate_reader(operand)
        bits = self.reader(operand, WIDTH[kind])
        if kind[0] != "s":
            return bits
        return lambda select: np.asarray(bits(select)).view(SIGNED[WIDTH[kind]])

    def _binary(self: Any, instruction: Instruction, integer: Any, floating: Any = None) -> Any:
        kind = instruction.types[-1]
        target = self.writer(instruction.arguments[0])
        x, y = (self._typed_reader(operand, kind) for operand in instruction.arguments[1:3])
        if kind == "f32":

            def run_float(select: Any, threads: np.ndarray) -> None:
                with np.errstate(all="ignore"):
                    target(select, np.asarray(floating(x(select), y(select)), np.float32).view(np.uint32))

            return run_float
        if kind == "pred":
            return lambda select, threads: target(select, integer(x(select), y(select)))
        if kind[0] == "f" or kind.startswith("bf"):
            raise EmulationError(f"{instruction.op} of {kind}")
        number, signed = UNSIGNED[WIDTH[kind]], SIGNED[WIDTH[kind]]

        def run(select: Any, threads: np.ndarray) -> None:
            with np.errstate(all="ignore"):
                result = np.asarray(integer(x(select), y(select)))
            target(select, result.astype(signed).view(number) if kind[0] == "s" else result.astype(number))

        return run

    def _wide_product(self: Any, instruction: Instruction) -> Any:
        """mul.wide, mul.hi and mad.wide: products of twice the width."""
        kind = instruction.types[-1]
        width = WIDTH[kind]
        wide = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * width]
        target = self.writer(instruction.arguments[0])
        x, y = (self._typed_reader(operand, kind) for operand in instruction.arguments[1:3])
        z = self.reader(instruction.arguments[3], 2 * width) if instruction.op == "mad" else None

        def run(select: Any, threads: np.ndarray) -> None:
            product = np.asarray(x(select)).astype(wide) * np.asarray(y(select)).astype(wide)
            if "hi" in instruction.modifiers:
                target(select, (product >> wide(width)).view(UNSIGNED[2 * width]).astype(UNSIGNED[width]))
            else:
                bits = product.view(UNSIGNED[2 * width])
                target(select, bits if z is None else bits + z(select))

        return run

    def _unary(self: Any, instruction: Instruction, function: Callable[[np.ndarray], Any]) -> Any:
        if instruction.types[-1] != "f32":
            raise EmulationError(f"{instruction.op} of {instruction.types[-1]}")
        target, x = self.writer(instruction.arguments[0]), self.float_reader(instruction.arguments[1])

        def run(select: Any, threads: np.ndarray) -> None:
            with np.errstate(all="ignore"):
                target(select, np.asarray(function(x(select)), np.float32).view(np.uint32))

        return run


def _wide(bits: Any) -> Any:
    return np.asarray(bits).astype(np.uint64)


def _quotient(x: Any, y: Any) -> Any:
    """x / y rounded towards zero, as PTX divides integers; 0 where y is 0."""
    kind = np.asarray(x).dtype
    x, y = np.asarray(x).astype(np.int64), np.asarray(y).astype(np.int64)
    return (np.abs(x) // np.maximum(np.abs(y), 1) * np.sign(x) * np.sign(y)).astype(kind)
