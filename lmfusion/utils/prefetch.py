"""Reads ahead in threads: a bounded number of items are submitted before the first result is taken."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def submit_ahead(submit: Callable[[T], U], items: Iterable[T], num_ahead: int) -> Iterator[U]:
    """`submit` of every item, in order; each is given out when `num_ahead` further ones have been submitted.

    submit: starts work on an item in a pool of the caller's, and returns a handle of it, such as a future.
    """
    submitted: deque[U] = deque()
    for item in items:
        submitted.append(submit(item))
        if len(submitted) > num_ahead:
            yield submitted.popleft()
    while submitted:
        yield submitted.popleft()


def map_threads(
    function: Callable[[T], U],
    items: Iterable[T],
    num_threads: int,
    *,
    num_ahead: int | None = None,
    name: str = "read",
) -> Iterator[U]:
    """`function` of every item, in order, from `num_threads` threads of its own.

    num_ahead: items in work or done beyond the one that is given out; None: two for each thread. name: of the threads,
    after "lmfusion-". Raises the error of the first item that has one. The threads end when the iterator does, when it
    is closed, and when it raises; what has not been begun by then is dropped.
    """
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix=f"lmfusion-{name}")
    try:
        ahead = 2 * num_threads if num_ahead is None else num_ahead
        for future in submit_ahead(lambda item: pool.submit(function, item), items, ahead):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
