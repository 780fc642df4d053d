"""Starts and ends a server: binds its socket, runs it until a signal, and bounds the time of its shutdown."""

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from lmfusion.serving.connections import LimitedServer
from lmfusion.serving.middleware import is_loopback
from lmfusion.utils.signals import handled_stop_signals

if TYPE_CHECKING:
    from lmfusion.generation.worker import EngineWorker

CLOSE_SECONDS = 15
"""Time from cancelling the last requests until their connections are closed."""


def bind(host: str, port: int) -> socket.socket:
    """A socket at `host` and `port` (0: any free port) that does not listen yet.

    Raises:
        ValueError: for a port out of range.
        OSError: with host and port, if the address is not available.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port must be between 0 and 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error}; choose another --host or --port") from None
    return listener


def url_of(host: str, listener: socket.socket) -> str:
    """The URL of the server for clients on this machine."""
    port = listener.getsockname()[1]
    name = "127.0.0.1" if host == "0.0.0.0" else "::1" if host == "::" else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def warn_if_public(host: str, what: str) -> None:
    """Warn on stderr that everybody can use `what`, if other machines can reach `host`."""
    if not is_loopback(host):
        warning = f"{host} can be reached from other machines: everybody who reaches it can use {what}, unencrypted"
        print(f"lmfusion: warning: {warning}", file=sys.stderr)


def run_until_signal(server: LimitedServer, listener: socket.socket) -> None:
    """Run `server` on a bound socket until SIGTERM or SIGINT.

    uvicorn has signal handlers of its own while it runs. It raises the signal again after its shutdown, and the signal
    may also arrive before uvicorn has started. The handler here makes both of them harmless.
    """

    def on_signal(number: int, earlier: Any) -> None:
        server.should_exit = True

    with handled_stop_signals(on_signal):
        server.run(sockets=[listener])


def run_server(
    app: FastAPI,
    worker: "EngineWorker",
    listener: socket.socket,
    *,
    shutdown_seconds: float,
    on_ready: Callable[[], None],
) -> None:
    """Serve until SIGTERM or SIGINT, let answers go on for `shutdown_seconds`, then cancel the rest.

    `worker` is closed when this returns. If a thread does not end in time, the process exits with code 1.

    Args:
        app: from `build_app`.
        worker: the worker of `app`.
        listener: a bound socket.
        shutdown_seconds: time that answers have after the signal.
        on_ready: called once requests are accepted.
    """
    server = EngineServer(app, worker, shutdown_seconds, on_ready)
    try:
        run_until_signal(server, listener)
    finally:
        worker.close()
        server.has_ended.set()


class EngineServer(LimitedServer):
    """The server of an engine: limited connections, and a shutdown that always ends.

    Args:
        app: from `build_app`.
        worker: the worker of `app`.
        shutdown_seconds: time that answers have after the signal.
        on_ready: called once requests are accepted.
        config: further settings of uvicorn.
    """

    def __init__(
        self,
        app: FastAPI,
        worker: "EngineWorker",
        shutdown_seconds: float,
        on_ready: Callable[[], None] = lambda: None,
        **config: Any,
    ) -> None:
        super().__init__(
            app, lifespan="off", timeout_graceful_shutdown=round(shutdown_seconds) + CLOSE_SECONDS, **config
        )
        self.has_ended = threading.Event()
        """Set it when everything has ended; otherwise the process is killed some time after the signal."""
        self._app = app
        self._worker = worker
        self._shutdown_seconds = shutdown_seconds
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's signal handler."""
        if not self.should_exit:
            threading.Thread(target=self._exit_if_stuck, name="lmfusion-exit", daemon=True).start()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.create_task(self._close_worker())
        await super().shutdown(sockets)
        closing.cancel()
        self._drop_unsubmitted()

    async def _close_worker(self) -> None:
        """Close the worker before the connections, so that cancelled answers still get their finish_reason."""
        await asyncio.sleep(self._shutdown_seconds)
        self._drop_unsubmitted()
        await asyncio.to_thread(self._worker.close)

    def _drop_unsubmitted(self) -> None:
        self._app.state.bodies.close()
        self._app.state.parsing_threads.close()

    def _exit_if_stuck(self) -> None:
        """Exit the process if the shutdown hangs. A thread that hangs in a device's driver cannot be ended alone."""
        if not self.has_ended.wait(self._shutdown_seconds + 2 * CLOSE_SECONDS):
            print("lmfusion: error: the server did not shut down in time; the process exits now", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)
