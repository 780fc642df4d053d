"""A cache for threads that holds values up to a number of bytes, and makes each value once.

cachetools has caches with a size in bytes, but under its lock either all values are made one after another, or two
threads that miss the same key make its value twice. Here a thread that misses a key waits for the one that makes it,
and other keys are free meanwhile. Values here are row groups and latents, which take long to make.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class ByteCache(Generic[T]):
    """Values by key, up to `max_bytes`. Threads may use it at the same time.

    evicts: True: the least recently used values make room for new ones, and the newest is always kept, however large.
    False: values are kept only while there is room. For keys that recur in a random order, such
    as the samples of an epoch, this finds as many values as eviction would, and some even where the order repeats.
    """

    def __init__(self, max_bytes: int, *, evicts: bool = True) -> None:
        self._room = max_bytes
        self._evicts = evicts
        self._values: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._making: dict[Hashable, Future[T]] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], tuple[T, int | None]]) -> T:
        """The value at `key`. If there is none, `make` returns it and its size in bytes; None: it is not to be kept.

        An error of `make` is raised in every thread that waits for the value. The next call tries again.
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
            future = self._making.get(key)
            if is_maker := future is None:
                future = self._making[key] = Future()
        assert future is not None
        if not is_maker:
            return future.result()
        try:
            value, num_bytes = make()
        except BaseException as error:
            with self._lock:
                del self._making[key]
            future.set_exception(error)
            raise
        with self._lock:
            if num_bytes is not None:
                self._keep(key, value, num_bytes)
            del self._making[key]
        future.set_result(value)
        return value

    def _keep(self, key: Hashable, value: T, num_bytes: int) -> None:
        if not self._evicts and num_bytes > self._room:
            return
        self._values[key] = value, num_bytes
        self._room -= num_bytes
        while self._room < 0 and len(self._values) > 1:
            self._room += self._values.popitem(last=False)[1][1]
