"""Runs the requests of `lmfusion generate` and `lmfusion caption` to their end, or until Ctrl-C."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmfusion.generation import Engine, Event
    from lmfusion.generation.api import EngineRequest

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def run_to_the_end(engine: "Engine", requests: "Sequence[EngineRequest]", show: Callable[[int, "Event"], None]) -> bool:
    """Pass every event to `show`, with the number of its request. Returns False if Ctrl-C was pressed.

    The events of a finished step are shown before Ctrl-C takes effect, unless it is pressed a second time.
    """
    from lmfusion.utils.signals import stop_signals

    numbers = {
        engine.submit(request.prompt, request.options, index=request.index): i for i, request in enumerate(requests)
    }
    try:
        with stop_signals() as stop:
            while engine.has_work:
                for request_id, event in engine.step():
                    show(numbers[request_id], event)
                if stop.is_set and engine.has_work:
                    return False
    except KeyboardInterrupt:
        return False
    return True
