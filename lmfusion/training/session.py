"""The session of a run in its folder: locked, continued from the newest checkpoint, and saved if it fails."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from lmfusion.training.distributed import World
from lmfusion.utils.config_values import to_values
from lmfusion.utils.files import locked, replace_text
from lmfusion.utils.signals import Stop, stop_signals


@contextmanager
def run_session(config: Any, world: World, resume: Callable[[], None]) -> Iterator[Stop]:
    """Hold the folder `config.output` for this run; SIGTERM and SIGINT set the flag that this yields.

    resume: loads the newest checkpoint. It is called again here, under the lock, because another process may have
    continued the run since it was called first. config.yaml gets the configuration. Raises OSError if another process
    holds the folder.
    """
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, world.rank), stop_signals() as stop:
        # Only rank 0 takes the lock. The others must wait for it before they read what another run may be writing.
        world.barrier()
        resume()
        if world.rank == 0:
            resolved = yaml.safe_dump(to_values(config), sort_keys=False, allow_unicode=True)
            replace_text(folder / "config.yaml", resolved)
        yield stop


@contextmanager
def saving_on(error: type[Exception], save: Callable[[], None]) -> Iterator[None]:
    """If the block raises `error`, call `save` first, so that the steps before it are not lost."""
    try:
        yield
    except error:
        with suppress(OSError):  # the first error is the one to report
            save()
        raise
