"""Connections: how many may be open, and how long each may wait, send nothing or take nothing.

uvicorn has a time limit for connections that idle between two requests, and none for a first byte, a header that comes
slowly, a body that nobody reads any more, or a client that does not take its answer. This file adds them.
"""

import asyncio
import contextlib
import logging
import os
import resource
import socket
import time
from typing import Any

import h11
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from lmfusion.serving.errors import ApiError

MAX_CONNECTIONS = 1024
"""Open at a time. Fewer, where the process may not open as many files."""
IDLE_SECONDS = 30.0
"""A connection on which no request begins is closed after so long."""
HEADER_SECONDS = 10.0
"""From the first byte of a request to the end of its header."""
STALL_SECONDS = 60.0
"""A client that takes nothing of its answer for so long is disconnected."""
MAX_DISCARDED_BYTES = 64 * 2**20
"""Of a refused body, read and thrown away. Many clients read an answer only after they have sent everything."""
MAX_PIPELINED_BYTES = 64 * 1024
"""Sent ahead of an answer at most before reading stops. While it goes on, a client that hangs up is noticed."""
MAX_BACKLOG = 128
"""New connections taken in one turn of the event loop."""
MIN_OTHER_FILES = 32
"""Files that may be opened besides connections."""
LOG_SECONDS = 60.0
"""What happens to many connections is logged once in so long."""

logger = logging.getLogger(__name__)


class Connections:
    """All connections of a server. `protocol` is what uvicorn calls for each new one.

    max_connections: open at a time. One more closes the oldest connection that has not sent a whole request yet, since
    an honest client needs only milliseconds for that. If there is none, the new one is answered with 503.
    """

    def __init__(self, max_connections: int = MAX_CONNECTIONS) -> None:
        self.max_connections = max_connections
        self.incomplete: dict[Connection, None] = {}
        """Those whose next request is not there in whole, the oldest first."""
        self._logged_at = -LOG_SECONDS

    def protocol(self, **arguments: Any) -> "Connection":
        return Connection(self, **arguments)

    def make_room(self, num_open: int) -> bool:
        """Close a connection if `num_open` are too many; False where none can be closed."""
        if num_open <= self.max_connections:
            return True
        oldest = next(iter(self.incomplete), None)
        if oldest is not None:
            del self.incomplete[oldest]
            oldest.transport.abort()
        self.warn(f"{self.max_connections} connections are open, the limit; idle ones are closed for new ones")
        return oldest is not None

    def warn(self, message: str) -> None:
        """Log `message`, if nothing was logged in the last minute."""
        if time.monotonic() - self._logged_at >= LOG_SECONDS:
            self._logged_at = time.monotonic()
            logger.warning("lmfusion: warning: %s (logged at most once a minute)", message)

    def on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An exception handler of the event loop. asyncio reports every connection that it has no file for."""
        if str(context.get("message", "")).startswith("socket.accept() out of system resource"):
            self.warn(f"no connection can be accepted: {context.get('exception')}")
        else:
            loop.default_exception_handler(context)


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 connection, with deadlines."""

    def __init__(self, shared: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._shared = shared
        self._request_deadline = _Deadline(self)
        self._stall_deadline = _Deadline(self)
        self._has_begun = False  # the first byte of the next request has come
        self._num_discarded = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._shared.make_room(len(self.connections)):
            self._shared.incomplete[self] = None
        else:
            body, headers = _unavailable()
            transport.write(b"HTTP/1.1 503 Service Unavailable\r\n" + headers + b"\r\n" + body)
            transport.close()
        self._request_deadline.set(IDLE_SECONDS)

    def data_received(self, data: bytes) -> None:
        if not self._is_answering():
            if self.conn.their_state is h11.SEND_BODY:
                self._num_discarded += len(data)
                if self._num_discarded > MAX_DISCARDED_BYTES:
                    self.transport.abort()
                    return
            elif not self._has_begun:
                self._has_begun = True
                self._request_deadline.set(HEADER_SECONDS)
        super().data_received(data)
        self._look()
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) <= MAX_PIPELINED_BYTES:
            self.flow.resume_reading()  # uvicorn would notice no end of a connection on which anything is left unread

    def on_response_complete(self) -> None:
        self._has_begun = False
        self._num_discarded = 0
        self._shared.incomplete[self] = None
        self._request_deadline.set(IDLE_SECONDS)
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._request_deadline.cancel()
        self._stall_deadline.cancel()
        self._shared.incomplete.pop(self, None)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_deadline.set(STALL_SECONDS)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall_deadline.cancel()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP, where an answer can still be begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = ApiError(400, msg, code="invalid_http", headers={"Connection": "close"}).response()
            for event in (
                h11.Response(status_code=400, headers=response.raw_headers),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self._is_answering():  # the app would answer, too: it may not have begun
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _is_answering(self) -> bool:
        """Whether a request's header has come, and its answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def _look(self) -> None:
        """Once a request's header is there, its body has limits of its own; so has an answer."""
        if self._is_answering():
            self._request_deadline.cancel()
            if self.conn.their_state is not h11.SEND_BODY:
                self._shared.incomplete.pop(self, None)


class _Deadline:
    """Cuts a connection after a time in which the client took nothing of what was to be sent to it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._timer: asyncio.TimerHandle | None = None
        self._num_unsent = 0

    def set(self, seconds: float) -> None:
        self.cancel()
        self._num_unsent = self._connection.transport.get_write_buffer_size()
        self._timer = self._connection.loop.call_later(seconds, self._expire, seconds)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self, seconds: float) -> None:
        if 0 < self._connection.transport.get_write_buffer_size() < self._num_unsent:
            self.set(seconds)
        else:
            self._connection.transport.abort()


def _unavailable() -> tuple[bytes, bytes]:
    """Body and headers for a connection that cannot be served."""
    error = ApiError(
        503,
        "all connections of the server are in use; try again in a few seconds",
        code="too_many_connections",
        headers={"Connection": "close", "Retry-After": "2"},
    )
    response: JSONResponse = error.response()
    return bytes(response.body), b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)


class LimitedServer(uvicorn.Server):
    """uvicorn's server of `app` with these limits. config: further settings of uvicorn."""

    def __init__(self, app: ASGIApp, **config: Any) -> None:
        max_connections, backlog = raise_file_limit()
        self._connections = Connections(max_connections)
        super().__init__(
            uvicorn.Config(
                app,
                http=self._connections.protocol,  # type: ignore[arg-type]
                ws="none",
                # Without warnings: uvicorn would write a line for every client that sends something strange
                log_level="error",
                access_log=False,
                server_header=False,
                backlog=backlog,
                timeout_keep_alive=round(IDLE_SECONDS),
                **config,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._connections.on_loop_error)
        await super().startup(sockets)


def raise_file_limit() -> tuple[int, int]:
    """Let the process open as many files as `MAX_CONNECTIONS` need, if it may.

    Returns the number of connections that may be open, and of new ones to take at once, so that enough files are left
    for everything else.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    wanted = num_open + MIN_OTHER_FILES + MAX_CONNECTIONS + _spare(MAX_BACKLOG)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):  # some systems say "unlimited" and allow less
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_free = MAX_CONNECTIONS * 2 if soft == resource.RLIM_INFINITY else soft - num_open - MIN_OTHER_FILES
    backlog = max(1, min(MAX_BACKLOG, num_free // 16))
    return max(1, min(MAX_CONNECTIONS, num_free - _spare(backlog))), backlog


def _spare(backlog: int) -> int:
    """Files of connections that were accepted, and are closed some turns of the event loop later."""
    return 4 * (backlog + 1)
