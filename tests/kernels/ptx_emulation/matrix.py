"""Matrix products: mma of a warp (sm_80), and wgmma of a warpgroup, whose operands may be in shared memory (sm_90a).

A wgmma is computed when it is waited for, a warp's 16 rows at a time. Until then its accumulators hold NaN and the
bytes it reads are counted, so that an early read or an early overwrite is found. Products are float32 sums over k = 16.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.kernels.ptx_emulation.memory import SWIZZLE_BITS
from tests.kernels.ptx_emulation.parser import Instruction, vector
from tests.kernels.ptx_emulation.values import EmulationError, halves, to_float32
from tests.kernels.ptx_emulation.warps import warps_of

_IN_FLIGHT = 0x7FDEAD00
"""What accumulators hold while a product is on its way: NaN."""
_ROW_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}
"""Of an operand in shared memory, by the swizzle in its descriptor."""
_SWIZZLE = {0: 0, 1: 3, 2: 2, 3: 1}
"""CUDA's number of that swizzle."""
_LANES = np.arange(32)


@dataclass
class _Product:
    accumulators: tuple[str, ...]
    kind: str
    num_columns: int
    adds: bool
    left: Any
    """Registers of the 16 x 16 operand, or addresses [16, 16] in shared memory."""
    right: np.ndarray
    """Addresses [num_columns, 16] in shared memory."""

    def addresses(self) -> list[np.ndarray]:
        """Of both bytes of every element that is read from shared memory."""
        found = [self.right] if isinstance(self.left, list) else [self.right, self.left]
        return [part for each in found for part in (each.reshape(-1), each.reshape(-1) + 1)]


@dataclass
class _Accumulator:
    values: np.ndarray
    """uint32 [registers, 32], without what is in flight"""
    num_products: int = 0


class MatrixProducts:
    """Part of a Block."""

    def __init__(self: Any) -> None:
        self.open_products: list[list[_Product]] = [[] for _ in range(self.num_warps)]
        self.product_groups: list[list[list[_Product]]] = [[] for _ in range(self.num_warps)]
        self.accumulators: list[dict[tuple[str, ...], _Accumulator]] = [{} for _ in range(self.num_warps)]

    def check_products_are_done(self: Any) -> None:
        if any(self.product_groups) or any(self.open_products):
            raise EmulationError("the kernel ends with products in flight")

    def op_mma(self: Any, instruction: Instruction) -> Any:
        shape = next(m for m in instruction.modifiers if re.fullmatch(r"m\d+n\d+k\d+", m))
        kind = instruction.types[1]
        if shape not in ("m16n8k16", "m16n8k8") or kind not in ("bf16", "f16"):
            raise EmulationError(instruction.text)
        depth = 16 if shape == "m16n8k16" else 8
        names = [vector(argument) for argument in instruction.arguments]
        targets = [self.writer(name) for name in names[0]]
        left, right = ([self.reader(name, 32) for name in group] for group in names[1:3])
        added = [self.float_reader(name) for name in names[3]]

        def run(select: Any, threads: np.ndarray) -> None:
            for warp in warps_of(threads):
                lanes = _LANES + 32 * warp
                a = _fragment(kind, [read(lanes) for read in left], depth)
                b = np.zeros((depth, 8), np.float32)
                for number, read in enumerate(right):
                    rows = _LANES % 4 * 2 + 8 * number
                    b[rows, _LANES // 4], b[rows + 1, _LANES // 4] = halves(kind, read(lanes))
                with np.errstate(all="ignore"):
                    product = a @ b
                    for number, (target, read) in enumerate(zip(targets, added, strict=True)):
                        part = product[_LANES // 4 + 8 * (number // 2), _LANES % 4 * 2 + number % 2]
                        target(lanes, (read(lanes) + part).astype(np.float32).view(np.uint32))

        return run

    def op_wgmma(self: Any, instruction: Instruction) -> Any:
        name = instruction.name
        if name.startswith("fence"):
            return lambda select, threads: None
        if name.startswith("commit_group"):
            return self._commit_products
        if name.startswith("wait_group"):
            return self._wait_for_products(int(instruction.arguments[0], 0))
        return self._begin_product(instruction)

    def _commit_products(self: Any, select: Any, threads: np.ndarray) -> None:
        for warp in warps_of(threads):
            self.product_groups[warp].append(self.open_products[warp])
            self.open_products[warp] = []

    def _wait_for_products(self: Any, num_left: int) -> Any:
        def run(select: Any, threads: np.ndarray) -> None:
            for warp in warps_of(threads):
                while len(self.product_groups[warp]) > num_left:
                    for product in self.product_groups[warp].pop(0):
                        self._finish_product(warp, product)

        return run

    def _begin_product(self: Any, instruction: Instruction) -> Any:
        columns, depth = map(int, re.search(r"m64n(\d+)k(\d+)", instruction.name).groups())
        kind = instruction.types[1]
        accumulators, left, right, scale, *immediates = instruction.arguments
        if depth != 16 or kind not in ("bf16", "f16") or [int(text, 0) for text in immediates[:2]] != [1, 1]:
            raise EmulationError(instruction.text)
        transposed = [int(text, 0) for text in immediates[2:]]
        names = tuple(vector(accumulators))
        in_registers = [self.reader(name, 32) for name in vector(left)] if left.startswith("{") else None
        left_descriptor = None if in_registers else self.reader(left, 64)
        right_descriptor = self.reader(right, 64)
        adds = self.predicate_reader(scale) if self.is_predicate(scale) else self.reader(scale, 32)
        if in_registers:  # which cannot be transposed
            transposed = [0, *transposed]
        left_transposed, right_transposed = (*transposed, 0, 0)[:2]

        def run(select: Any, threads: np.ndarray) -> None:
            for warp in warps_of(threads):
                lanes = _LANES + 32 * warp
                if not np.isin(lanes, threads).all():
                    raise EmulationError(f"a part of a warp issues {instruction.text}")
                if in_registers is not None:
                    operand: Any = [np.asarray(read(lanes)).copy() for read in in_registers]
                else:
                    rows = _operand_addresses(_uniform(left_descriptor(lanes)), 64, left_transposed)
                    operand = rows[16 * (warp % 4) : 16 * (warp % 4) + 16]
                addresses = _operand_addresses(_uniform(right_descriptor(lanes)), columns, right_transposed)
                product = _Product(names, kind, columns, bool(_uniform(adds(lanes))), operand, addresses)
                for where in product.addresses():
                    if where.max() >= self.shared.size:
                        raise EmulationError(f"beyond shared memory: {instruction.text}")
                    self.check_fenced(where)
                    np.add.at(self.num_readers, where, 1)
                self._take_accumulators(warp, lanes, names)
                self.open_products[warp].append(product)

        return run

    def _take_accumulators(self: Any, warp: int, lanes: np.ndarray, names: tuple[str, ...]) -> None:
        held = self.accumulators[warp]
        if names not in held:
            if any(set(names) & set(others) for others in held):
                raise EmulationError(f"accumulators of two products in flight overlap: {self.current.text}")
            held[names] = _Accumulator(np.stack([self.registers[name][lanes] for name in names]))
            for name in names:
                self.registers[name][lanes] = _IN_FLIGHT
        held[names].num_products += 1

    def _finish_product(self: Any, warp: int, product: _Product) -> None:
        left = product.left
        a = _fragment(product.kind, left, 16) if isinstance(left, list) else self._read_operand(product.kind, left)
        with np.errstate(all="ignore"):
            result = a @ self._read_operand(product.kind, product.right).T
        for where in product.addresses():
            np.subtract.at(self.num_readers, where, 1)
        accumulator = self.accumulators[warp][product.accumulators]
        before = accumulator.values.view(np.float32).reshape(product.num_columns // 8, 4, 32)
        after = np.empty_like(before)
        columns = _LANES % 4 * 2 + 8 * np.arange(product.num_columns // 8)[:, None]
        for number in range(4):
            part = result[(_LANES // 4 + 8 * (number // 2))[None], columns + number % 2]
            with np.errstate(all="ignore"):
                after[:, number] = part + before[:, number] if product.adds else part
        accumulator.values = after.reshape(-1, 32).view(np.uint32)
        accumulator.num_products -= 1
        if accumulator.num_products == 0:
            for name, values in zip(product.accumulators, accumulator.values, strict=True):
                self.registers[name][_LANES + 32 * warp] = values
            del self.accumulators[warp][product.accumulators]

    def _read_operand(self: Any, kind: str, addresses: np.ndarray) -> np.ndarray:
        low, high = self.shared[addresses].astype(np.uint16), self.shared[addresses + 1].astype(np.uint16)
        return to_float32(kind, low | high << np.uint16(8))


def _uniform(values: Any) -> int:
    """What all lanes of a warp hold."""
    return int(np.asarray(values).flat[0])


def _fragment(kind: str, registers: list[Any], depth: int) -> np.ndarray:
    """The operand [16, depth] that a warp holds in registers."""
    matrix = np.zeros((16, depth), np.float32)
    for number, pairs in enumerate(registers):
        rows, columns = _LANES // 4 + 8 * (number % 2), _LANES % 4 * 2 + 8 * (number // 2)
        matrix[rows, columns], matrix[rows, columns + 1] = halves(kind, pairs)
    return matrix


def _operand_addresses(descriptor: int, size: int, is_transposed: int) -> np.ndarray:
    """Addresses in shared memory of the elements [size, 16] of an operand, from its matrix descriptor."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    mode = descriptor >> 62 & 3
    if descriptor >> 49 & 7:
        raise EmulationError("a matrix descriptor with a base offset")
    width = _ROW_BYTES[mode]
    i, k = np.arange(size)[:, None], np.arange(16)[None]
    if is_transposed:
        if mode == 0:
            raise EmulationError("a transposed operand without swizzle")
        per_row = width // 2
        address = start + i // per_row * leading + k // 8 * stride + k % 8 * width + i % per_row * 2
    elif mode == 0:
        address = start + i // 8 * stride + i % 8 * width + k // 8 * leading + k % 8 * 2
    else:
        address = start + i // 8 * stride + i % 8 * width + k * 2
    return address ^ ((address >> 3) & SWIZZLE_BITS[_SWIZZLE[mode]])
