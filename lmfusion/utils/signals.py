"""Stops a run at the next boundary between steps after the first SIGTERM or Ctrl-C."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

STDERR = 2


class Stop:
    """Whether a signal has asked the run to stop."""

    is_set = False


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Inside the block, the first SIGTERM or SIGINT only sets the flag; a second one acts as usual.

    Python delivers signals only to the main thread; in other threads the flag is never set.
    """
    stop = Stop()
    handlers: dict[int, Any] = {}
    is_main = threading.current_thread() is threading.main_thread()
    numbers: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT) if is_main else ()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.is_set = True
        signal.signal(number, handlers[number])
        with suppress(OSError):  # not print, which raises if the signal interrupts another print
            os.write(STDERR, b"stopping after this step; once more to stop at once\n")

    for number in numbers:
        handlers[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
