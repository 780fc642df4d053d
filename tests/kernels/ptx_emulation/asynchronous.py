"""Asynchronous copies and what waits for them: cp.async and its groups, TMA loads and stores, mbarriers, proxy fences.

A copy is done as late as the program allows: cp.async when its group is waited for, a TMA load when a thread finds that
the mbarrier it completes is not done. Copies that end at the same mbarrier land in random order.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.kernels.ptx_emulation.memory import TensorMap
from tests.kernels.ptx_emulation.parser import Instruction, split_arguments
from tests.kernels.ptx_emulation.values import EmulationError
from tests.kernels.ptx_emulation.warps import warps_of

_POISON = 0xFF
_MAX_IDLE_WAITS = 20_000
"""Waits in a row after which no thread will ever arrive."""


@dataclass
class _Mbarrier:
    count: int
    pending: int
    num_bytes: int = 0
    """Still expected in this phase."""
    phase: int = 0

    def settle(self) -> None:
        if self.pending < 0:
            raise EmulationError("an mbarrier is arrived at more often than it counts")
        if self.pending == 0 and self.num_bytes == 0:
            self.phase ^= 1
            self.pending = self.count


@dataclass
class _BoxCopy:
    """A box on its way between global and shared memory; see `TensorMap.elements`."""

    tensor_map: TensorMap
    shared: np.ndarray
    outside: np.ndarray
    is_inside: np.ndarray
    mbarrier: int = -1


class Asynchronous:
    """Part of a Block."""

    def __init__(self: Any) -> None:
        self.mbarriers: dict[int, _Mbarrier] = {}
        self.loads: list[_BoxCopy] = []
        self.stores: list[_BoxCopy] = []
        self.num_idle_waits = 0
        self.open_copies: list[list[Any]] = [[] for _ in range(self.num_warps)]
        """By warp: copies by cp.async that are in no group yet, (where, data, threads)."""
        self.copy_groups: list[list[list[Any]]] = [[] for _ in range(self.num_warps)]

    def op_cp(self: Any, instruction: Instruction) -> Any:
        name = instruction.name
        if name.startswith("async.bulk"):
            return self._bulk(instruction)
        if name.startswith("async.commit_group"):
            return self._commit_copies
        if name.startswith(("async.wait_group", "async.wait_all")):
            return self._wait_for_copies(instruction)
        if name.startswith(("async.cg", "async.ca")):
            return self._copy(instruction)
        raise EmulationError(instruction.text)

    # ---- cp.async ----------------------------------------------------------------------------------------------------

    def _copy(self: Any, instruction: Instruction) -> Any:
        to, of, size, *source_size = instruction.arguments
        num_bytes = int(size, 0)
        to_address, of_address = self.addresses(to, 32), self.addresses(of, 64)
        sizes = self.reader(source_size[0], 32) if source_size else None

        def run(select: Any, threads: np.ndarray) -> None:
            where = self._bytes_at(to_address(select, threads), num_bytes)
            data = np.zeros((threads.size, num_bytes), np.uint8)
            # A source size of 0 fills with zeros and reads nothing; Triton uses no sizes between.
            is_on = np.ones(threads.size, bool)
            if sizes is not None:
                wanted = np.broadcast_to(np.asarray(sizes(select)).astype(np.int64), (threads.size,))
                if not np.isin(wanted, (0, num_bytes)).all():
                    raise EmulationError(f"not emulated: {instruction.text} of a part")
                is_on = wanted > 0
            if is_on.any():
                data[is_on] = self.memory.read(of_address(select, threads)[is_on], num_bytes)
            self.check_no_reader(where)
            self.shared[where] = _POISON
            for warp in warps_of(threads):
                own = threads // 32 == warp
                self.open_copies[warp].append((where[own], data[own], threads[own]))

        return run

    def _commit_copies(self: Any, select: Any, threads: np.ndarray) -> None:
        for warp in warps_of(threads):
            self.copy_groups[warp].append(self.open_copies[warp])
            self.open_copies[warp] = []

    def _wait_for_copies(self: Any, instruction: Instruction) -> Any:
        num_left = int(instruction.arguments[0], 0) if instruction.arguments else None

        def run(select: Any, threads: np.ndarray) -> None:
            if num_left is None:
                self._commit_copies(select, threads)
            for warp in warps_of(threads):
                while len(self.copy_groups[warp]) > (num_left or 0):
                    for where, data, owners in self.copy_groups[warp].pop(0):
                        self.shared[where] = data
                        # cp.async writes by the generic proxy, as ordinary stores do.
                        self.unfenced_writer[where] = owners[:, None] + 1
                        self.is_synchronised[where] = False

        return run

    def op_fence(self: Any, instruction: Instruction) -> Any:
        if "proxy" not in instruction.modifiers or "async" not in instruction.name:
            return lambda select, threads: None

        def run(select: Any, threads: np.ndarray) -> None:
            # A fence covers the writes of its own thread, and those that a barrier made visible to it.
            is_fencing = np.zeros(self.num_threads + 1, bool)
            is_fencing[threads + 1] = True
            covered = is_fencing[self.unfenced_writer] | self.is_synchronised
            self.unfenced_writer[covered] = 0
            self.is_synchronised[covered] = False

        return run

    # ---- mbarrier ----------------------------------------------------------------------------------------------------

    def op_mbarrier(self: Any, instruction: Instruction) -> Any:
        name = instruction.name
        operand = next(item for item in instruction.arguments if item.startswith("["))
        address = self.addresses(operand)
        if name.startswith("init"):
            return self._init_mbarrier(instruction, address)
        if name.startswith("inval"):
            return lambda select, threads: self.mbarriers.pop(int(address(select, threads)[0]), None)
        if name.startswith("arrive"):
            return self._arrive(instruction, address)
        if name.startswith(("try_wait", "test_wait")):
            return self._try_wait(instruction, address)
        raise EmulationError(instruction.text)

    def _init_mbarrier(self: Any, instruction: Instruction, address: Any) -> Any:
        counts = self.reader(instruction.arguments[1], 32)

        def run(select: Any, threads: np.ndarray) -> None:
            if threads.size > 1:
                raise EmulationError(f"{threads.size} threads initialise one mbarrier")
            where, count = int(address(select, threads)[0]), int(np.asarray(counts(select)).flat[0])
            if where % 8:
                raise EmulationError("an mbarrier must be at a multiple of 8 bytes")
            self.mbarriers[where] = _Mbarrier(count, count)

        return run

    def _arrive(self: Any, instruction: Instruction, address: Any) -> Any:
        last = instruction.arguments[-1]
        number = self.reader(last, 32) if not last.startswith("[") else None
        expects_bytes = "expect_tx" in instruction.modifiers

        def run(select: Any, threads: np.ndarray) -> None:
            numbers = np.ones(threads.size, np.int64)
            if number is not None:
                numbers = np.broadcast_to(np.asarray(number(select)).astype(np.int64), (threads.size,))
            for where, value in zip(address(select, threads), numbers, strict=True):
                barrier = self._mbarrier(int(where))
                barrier.num_bytes += int(value) if expects_bytes else 0
                barrier.pending -= 1 if expects_bytes else int(value)
                barrier.settle()
            self.num_idle_waits = 0

        return run

    def _try_wait(self: Any, instruction: Instruction, address: Any) -> Any:
        target, phases = self.writer(instruction.arguments[0]), self.reader(instruction.arguments[2], 32)

        def run(select: Any, threads: np.ndarray) -> None:
            where = address(select, threads)
            phase = np.broadcast_to(np.asarray(phases(select)).astype(np.int64) & 1, (threads.size,))
            is_done = np.zeros(threads.size, bool)
            for each in np.unique(where):
                barrier = self._mbarrier(int(each))
                own = where == each
                if (phase[own] == barrier.phase).any():
                    self._land_loads(int(each), barrier)
                is_done |= own & (phase != barrier.phase)
            target(select, is_done)
            self.asleep_until[threads[~is_done]] = self.num_steps + int(self.random.integers(20, 200))
            self.num_idle_waits = 0 if is_done.any() else self.num_idle_waits + 1
            if self.num_idle_waits > _MAX_IDLE_WAITS:
                raise EmulationError(f"a wait that never ends: {instruction.text}")

        return run

    def _mbarrier(self: Any, where: int) -> _Mbarrier:
        if where not in self.mbarriers:
            raise EmulationError(f"there is no mbarrier at {where}: {self.current.text}")
        return self.mbarriers[where]

    def _land_loads(self: Any, where: int, barrier: _Mbarrier) -> None:
        phase = barrier.phase
        own = [load for load in self.loads if load.mbarrier == where]
        while own and barrier.phase == phase:
            load = own.pop(int(self.random.integers(len(own))))
            self.loads = [other for other in self.loads if other is not load]
            self._finish_load(load)

    # ---- TMA ---------------------------------------------------------------------------------------------------------

    def _bulk(self: Any, instruction: Instruction) -> Any:
        name = instruction.name
        if "commit_group" in name:
            return lambda select, threads: None
        if "wait_group" in name:
            return lambda select, threads: self.finish_stores()
        if "tensor" not in name:
            raise EmulationError(instruction.text)
        is_load = name.index("shared") < name.index("global")
        tensor = next(item for item in instruction.arguments if "{" in item)
        map_operand, coordinate_list = split_arguments(tensor[1:-1])
        coordinates = [self.reader(item, 32) for item in split_arguments(coordinate_list[1:-1])]
        map_address = self.reader(map_operand, 64)
        others = [item for item in instruction.arguments if item is not tensor]
        shared_address = self.addresses(others[0])
        mbarrier_address = self.addresses(others[1]) if is_load else None

        def run(select: Any, threads: np.ndarray) -> None:
            if warps_of(threads).size < threads.size:
                raise EmulationError(f"several threads of a warp issue one TMA copy: {instruction.text}")
            for thread in threads:
                one = np.array([thread])
                at = [int(np.asarray(read(one)).astype(np.uint32).view(np.int32).flat[0]) for read in coordinates]
                number, shared = int(np.asarray(map_address(one)).flat[0]), int(shared_address(one, one)[0])
                copy = self._box(number, at, shared)
                if mbarrier_address is None:
                    self.check_fenced(_bytes(copy))
                    self.stores.append(copy)
                else:
                    copy.mbarrier = int(mbarrier_address(one, one)[0])
                    self._begin_load(copy)

        return run

    def _begin_load(self: Any, copy: _BoxCopy) -> None:
        where = _bytes(copy)
        self.check_no_reader(where)
        self.shared[where] = _POISON
        self.unfenced_writer[where] = 0
        if self.schedule.is_late:
            self.loads.append(copy)
        else:
            self._finish_load(copy)

    def _box(self: Any, number: int, coordinates: list[int], shared: int) -> _BoxCopy:
        """The box of the tensor map at the generic address `number`, and where it is in shared memory."""
        text = self.current.text
        if number not in self.tensor_maps:
            raise EmulationError(f"there is no tensor map at {number:#x}: {text}")
        tensor_map = self.tensor_maps[number]
        if len(coordinates) != len(tensor_map.sizes):
            raise EmulationError(f"{len(coordinates)} coordinates for {len(tensor_map.sizes)} dimensions: {text}")
        if shared % 128:
            raise EmulationError(f"TMA needs shared memory at a multiple of 128 bytes, got {shared}: {text}")
        copy = _BoxCopy(tensor_map, *tensor_map.elements(coordinates, shared))
        if _bytes(copy).max() >= self.shared.size:
            raise EmulationError(f"beyond shared memory: {text}")
        return copy

    def _finish_load(self: Any, copy: _BoxCopy) -> None:
        size = copy.tensor_map.element_size
        data = np.zeros((*copy.shared.shape, size), np.uint8)
        if copy.is_inside.any():
            data[copy.is_inside] = self.memory.read(copy.outside[copy.is_inside], size)
        self.shared[_bytes(copy)] = data.reshape(-1)
        barrier = self._mbarrier(copy.mbarrier)
        barrier.num_bytes -= data.size
        barrier.settle()

    def finish_stores(self: Any) -> None:
        while self.stores:
            copy = self.stores.pop(0)
            data = self.shared[_bytes(copy)].reshape(*copy.shared.shape, -1)
            if copy.is_inside.any():
                self.memory.write(copy.outside[copy.is_inside], data[copy.is_inside])


def _bytes(copy: _BoxCopy) -> np.ndarray:
    """Every byte of a box in shared memory, in the order of its elements."""
    return (copy.shared[..., None] + np.arange(copy.tensor_map.element_size)).reshape(-1)
