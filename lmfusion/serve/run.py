"""How does the server start and end? A socket first, then the model; after a signal answers may go on for a while."""

import asyncio
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from lmfusion.generation.worker import EngineWorker
from lmfusion.serve.guard import is_loopback

KEEP_ALIVE_SECONDS = 30
"""How long a connection without a request stays open."""
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
    app: ASGIApp,
    worker: EngineWorker,
    listener: socket.socket,
    *,
    shutdown_seconds: float,
    on_ready: Callable[[], None],
) -> None:
    """Serve until SIGTERM or SIGINT; then let answers go on for `shutdown_seconds` and cancel what is left.

    on_ready: called once requests are taken. `worker` is closed when this returns.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=round(shutdown_seconds) + LAST_SECONDS,
    )
    server = _Server(config, worker, shutdown_seconds, on_ready)

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


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, worker: EngineWorker, shutdown_seconds: float, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._worker = worker
        self._shutdown_seconds = shutdown_seconds
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.create_task(self._close_worker())
        await super().shutdown(sockets)
        closing.cancel()

    async def _close_worker(self) -> None:
        """Cancelled requests still end as answers do, with a finish_reason."""
        await asyncio.sleep(self._shutdown_seconds)
        await asyncio.to_thread(self._worker.close)
