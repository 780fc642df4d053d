"""How does the server start and end? A socket first, then the model; after a signal answers may go on for a while."""

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from lmfusion.serving.connections import LimitedServer
from lmfusion.serving.guard import is_loopback

if TYPE_CHECKING:
    from lmfusion.generation.worker import EngineWorker

LAST_SECONDS = 15
"""From the cancelling of the last requests to the cutting of their connections."""


def bind(host: str, port: int) -> socket.socket:
    """A socket at `host` and `port` (0: any that is free), not listening yet.

    Raises ValueError for a port that is none, OSError that names both where they cannot be had.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port is {port}; it is between 0 and 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error}; choose another --host or --port") from None
    return listener


def url_of(host: str, listener: socket.socket) -> str:
    """Where clients on this machine find the server."""
    port = listener.getsockname()[1]
    name = "127.0.0.1" if host == "0.0.0.0" else "::1" if host == "::" else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def warn_if_open(host: str, has_key: bool) -> None:
    """Say on stderr who can use a server that others can reach."""
    if is_loopback(host):
        return
    who = "with the API key" if has_key else "WITHOUT ANY KEY (set LMFUSION_API_KEY or --api-key-file)"
    print(
        f"lmfusion: warning: {host} is more than this machine: everybody who reaches it can use the model {who}, "
        "unencrypted",
        file=sys.stderr,
    )


def run_server(
    app: FastAPI,
    worker: "EngineWorker",
    listener: socket.socket,
    *,
    shutdown_seconds: float,
    on_ready: Callable[[], None],
) -> None:
    """Serve until SIGTERM or SIGINT; then let answers go on for `shutdown_seconds` and cancel what is left.

    app: of `build_app`. on_ready: called once requests are taken. `worker` is closed when this returns. If a
    thread does not end in time, the process exits with code 1.
    """
    server = Server(app, worker, shutdown_seconds, on_ready)

    def stop(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    # uvicorn raises a signal once more when it has shut down, for the handlers that were there before
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        worker.close()
        server.has_ended.set()


class Server(LimitedServer):
    """The server of an engine: limits of connections, and a shutdown that ends.

    app: of `build_app`. config: further settings of uvicorn.
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
            app, lifespan="off", timeout_graceful_shutdown=round(shutdown_seconds) + LAST_SECONDS, **config
        )
        self.has_ended = threading.Event()
        """To be set when everything has ended; the process is ended otherwise."""
        self._app = app
        self._worker = worker
        self._shutdown_seconds = shutdown_seconds
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            threading.Thread(target=self._force_exit, name="lmfusion-end", daemon=True).start()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.create_task(self._close_worker())
        await super().shutdown(sockets)
        closing.cancel()
        self._stop_reading()

    async def _close_worker(self) -> None:
        """Cancelled requests still end as answers do, with a finish_reason."""
        await asyncio.sleep(self._shutdown_seconds)
        self._stop_reading()
        await asyncio.to_thread(self._worker.close)

    def _stop_reading(self) -> None:
        self._app.state.bodies.close()
        self._app.state.readers.close()

    def _force_exit(self) -> None:
        """End the process if shutdown hangs: a thread that hangs in a device's driver cannot be ended by itself."""
        if not self.has_ended.wait(self._shutdown_seconds + 2 * LAST_SECONDS):
            print("lmfusion: error: the server did not shut down in time; its process ends now", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)
