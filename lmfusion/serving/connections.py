"""Limits of connections: their number, and how long a client may send nothing or read nothing.

uvicorn has a time limit for connections that are idle between two requests. It has none for the first byte, a slow
header, a body that is no longer read, or a client that does not read its answer. This file adds them.
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

from lmfusion.serving.errors import RETRY_SECONDS, ApiError

MAX_CONNECTIONS = 1024
"""Open connections. The limit is lower if the process may not open that many files."""
IDLE_SECONDS = 30.0
"""Time until a connection without a request is closed."""
HEADER_SECONDS = 10.0
"""Time from the first byte of a request to the end of its header."""
STALL_SECONDS = 60.0
"""Time after which a client that reads nothing of its answer is disconnected."""
MAX_DISCARDED_BYTES = 64 * 2**20
"""Bytes of a refused body that are read and discarded. Many clients read the answer only after sending everything."""
MAX_PIPELINED_BYTES = 64 * 1024
"""Bytes sent ahead of an answer until reading stops. A disconnect is noticed only while reading goes on."""
MAX_BACKLOG = 128
"""New connections accepted in one turn of the event loop."""
MIN_OTHER_FILES = 32
"""Files reserved for everything besides connections."""
LOG_SECONDS = 60.0
"""Minimum time between two warnings about connections."""

logger = logging.getLogger(__name__)


class Connections:
    """All connections of a server. uvicorn calls `protocol` for each new one.

    Args:
        max_connections: number of open connections. One more closes the oldest connection that has not sent a complete
            request yet, since a well-behaved client needs only milliseconds for that. If there is none, the new
            connection is answered with 503.
    """

    def __init__(self, max_connections: int = MAX_CONNECTIONS) -> None:
        self.max_connections = max_connections
        self.incomplete: dict[Connection, None] = {}
        """Connections whose next request is not complete, the oldest first."""
        self._logged_at = -LOG_SECONDS

    def protocol(self, **arguments: Any) -> "Connection":
        return Connection(self, **arguments)

    def make_room(self, num_open: int) -> bool:
        """Close a connection if `num_open` are too many. False if none can be closed."""
        if num_open <= self.max_connections:
            return True
        oldest = next(iter(self.incomplete), None)
        if oldest is not None:
            del self.incomplete[oldest]
            oldest.transport.abort()
        self.warn(f"{self.max_connections} connections are open, the limit; idle ones are closed for new ones")
        return oldest is not None

    def warn(self, message: str) -> None:
        """Log `message` unless a warning was logged in the last LOG_SECONDS."""
        if time.monotonic() - self._logged_at >= LOG_SECONDS:
            self._logged_at = time.monotonic()
            logger.warning("lmfusion: warning: %s (logged at most once a minute)", message)

    def on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """The event loop's exception handler. asyncio reports each connection for which no file can be opened."""
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
        self._has_started = False  # whether the first byte of the next request has arrived
        self._num_discarded = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._shared.make_room(len(self.connections)):
            self._shared.incomplete[self] = None
        else:
            body, headers = _too_many_connections()
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
            elif not self._has_started:
                self._has_started = True
                self._request_deadline.set(HEADER_SECONDS)
        super().data_received(data)
        self._track_request()
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) <= MAX_PIPELINED_BYTES:
            # uvicorn stops reading when anything follows the request. Then it would not notice a disconnect.
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        self._has_started = False
        self._num_discarded = 0
        self._shared.incomplete[self] = None
        self._request_deadline.set(IDLE_SECONDS)
        super().on_response_complete()
        self._track_request()

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
        """Answer bytes that are not HTTP, unless an answer has already been started."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = ApiError(400, msg, code="invalid_http", headers={"Connection": "close"}).response()
            for event in (
                h11.Response(status_code=400, headers=response.raw_headers),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self._is_answering():  # the app may not have started its answer: keep it from sending a second one
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _is_answering(self) -> bool:
        """Whether the header of a request is complete and its answer is not."""
        return self.cycle is not None and not self.cycle.response_complete

    def _track_request(self) -> None:
        """After the header other limits apply, and after the body the request is complete."""
        if self._is_answering():
            self._request_deadline.cancel()
            if self.conn.their_state is not h11.SEND_BODY:
                self._shared.incomplete.pop(self, None)


class _Deadline:
    """Aborts a connection after a time in which the client has read nothing of what is being sent to it."""

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


def _too_many_connections() -> tuple[bytes, bytes]:
    """Body and headers of the answer to a connection that cannot be served."""
    error = ApiError(
        503,
        f"all connections of the server are in use; try again in {RETRY_SECONDS} seconds",
        code="too_many_connections",
        headers={"Connection": "close", "Retry-After": str(RETRY_SECONDS)},
    )
    response: JSONResponse = error.response()
    return bytes(response.body), b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)


class LimitedServer(uvicorn.Server):
    """uvicorn's server of `app` with the limits of this file. config: further settings of uvicorn."""

    def __init__(self, app: ASGIApp, **config: Any) -> None:
        max_connections, backlog = raise_file_limit()
        self._connections = Connections(max_connections)
        super().__init__(
            uvicorn.Config(
                app,
                http=self._connections.protocol,  # type: ignore[arg-type]
                ws="none",
                # Without warnings: uvicorn would write a line for each client that sends something odd.
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
    """Raise the process's limit of open files to what MAX_CONNECTIONS needs, as far as allowed.

    Returns:
        The number of connections that may be open, and the number to accept at once, such that enough files are left
        for everything else.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    needed = num_open + MIN_OTHER_FILES + MAX_CONNECTIONS + _num_closing(MAX_BACKLOG)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):  # some systems report "unlimited" and allow less
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_free = MAX_CONNECTIONS * 2 if soft == resource.RLIM_INFINITY else soft - num_open - MIN_OTHER_FILES
    backlog = max(1, min(MAX_BACKLOG, num_free // 16))
    return max(1, min(MAX_CONNECTIONS, num_free - _num_closing(backlog))), backlog


def _num_closing(backlog: int) -> int:
    """Files of connections that have been accepted and will be closed some turns of the event loop later."""
    return 4 * (backlog + 1)
