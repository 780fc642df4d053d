"""Graceful stops: SIGTERM and Ctrl-C ask a run or a server to stop, instead of ending the process at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

STDERR = 2
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Whether a signal has asked the run to stop."""

    is_set = False


@contextmanager
def handled_stop_signals(on_signal: Callable[[int, Any], None]) -> Iterator[None]:
    """Inside, SIGTERM and SIGINT call `on_signal(number, earlier handler)`; afterwards the earlier handlers are back.

    Python runs signal handlers in the main thread only; in other threads this does nothing.
    """
    is_main = threading.current_thread() is threading.main_thread()
    # Read before the first handler is set, because a signal may arrive between the two.
    earlier = {number: signal.getsignal(number) for number in STOP_SIGNALS if is_main}

    def handle(number: int, frame: FrameType | None) -> None:
        on_signal(number, earlier[signal.Signals(number)])

    for number in earlier:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Inside, the first SIGTERM or SIGINT only sets the flag; the next one has its earlier effect.

    In threads other than the main thread the flag stays unset.
    """
    stop = Stop()

    def on_signal(number: int, earlier: Any) -> None:
        stop.is_set = True
        signal.signal(number, earlier)
        with suppress(OSError):  # not print, which raises if the signal interrupts another print
            os.write(STDERR, b"stopping after this step; once more to stop at once\n")

    with handled_stop_signals(on_signal):
        yield stop
