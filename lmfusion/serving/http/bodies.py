"""Bodies of requests: read from connections within limits of size, time and memory."""

import asyncio
from dataclasses import dataclass

from starlette.requests import Request

from lmfusion.serving.errors import ApiError

BODY_SECONDS = 60.0
"""A request that is not complete by then is not waited for."""
GRACE_SECONDS = 10.0
MIN_BYTES_PER_SECOND = 8 * 1024
"""A body must come at least at this rate, after the seconds of grace."""
RETRY_SECONDS = 2
"""Seconds after which a client that finds the server full is told to try again."""


@dataclass(eq=False)
class _Body:
    """A body on its way."""

    deadline: asyncio.Timeout
    start: float
    num_bytes: int = 0
    error: ApiError | None = None
    """Why it was given up before its time."""


class Bodies:
    """Reads bodies for an app. Used in the event loop's thread alone.

    max_bytes: of one body. max_number, max_total_bytes: of all bodies that are being received. Beyond them the oldest
    is given up; otherwise clients that send nothing would keep everybody else out.
    """

    def __init__(self, max_bytes: int, max_number: int, max_total_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._max_number = max_number
        self._max_total_bytes = max_total_bytes
        self._num_bytes = 0
        self._on_their_way: dict[_Body, None] = {}

    async def read(self, http: Request) -> bytes:
        """The body. Raises ApiError as soon as it is too large or too slow, or the client has hung up."""
        length = http.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_bytes:
            raise self._too_large()
        start = asyncio.get_running_loop().time()
        body: _Body | None = None
        try:
            async with asyncio.timeout(min(GRACE_SECONDS, BODY_SECONDS)) as deadline:
                body = _Body(deadline, start)
                self._on_their_way[body] = None
                self._make_room()
                return await self._receive(http, body)
        except TimeoutError:
            if body is not None and body.error is not None:
                raise body.error from None
            message = f"the request was not complete after {BODY_SECONDS:.0f} seconds, or came too slowly: at least "
            message += f"{MIN_BYTES_PER_SECOND} bytes a second are expected after {GRACE_SECONDS:.0f} seconds"
            raise ApiError(408, message, code="timeout", headers={"Connection": "close"}) from None
        finally:
            if body is not None:
                self._forget(body)

    def close(self) -> None:
        """Give up everything that is on its way."""
        for body in list(self._on_their_way):
            self._give_up(body, stopping())

    async def _receive(self, http: Request, body: _Body) -> bytes:
        chunks = bytearray()
        while True:
            message = await http.receive()
            if message["type"] == "http.disconnect":
                raise hung_up()
            chunk = message.get("body", b"")
            chunks += chunk
            if len(chunks) > self._max_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(chunks)
            if body in self._on_their_way:
                body.num_bytes += len(chunk)
                self._num_bytes += len(chunk)
                seconds = min(BODY_SECONDS, GRACE_SECONDS + len(chunks) / MIN_BYTES_PER_SECOND)
                body.deadline.reschedule(body.start + seconds)
                self._make_room()

    def _make_room(self) -> None:
        while len(self._on_their_way) > self._max_number or self._num_bytes > self._max_total_bytes:
            message = "too many requests are being sent, and this one has taken the longest; try again in a few seconds"
            self._give_up(next(iter(self._on_their_way)), busy(message))

    def _give_up(self, body: _Body, error: ApiError) -> None:
        self._forget(body)
        if not body.deadline.expired():
            body.error = error
            body.deadline.reschedule(0)

    def _forget(self, body: _Body) -> None:
        if body in self._on_their_way:
            del self._on_their_way[body]
            self._num_bytes -= body.num_bytes

    def _too_large(self) -> ApiError:
        message = f"the request has more than {self._max_bytes} bytes, which is the limit here"
        return ApiError(413, message, code="request_too_large")


def busy(message: str) -> ApiError:
    """For a client that should come back later."""
    return ApiError(429, message, code="queue_full", headers={"Retry-After": str(RETRY_SECONDS)})


def hung_up() -> ApiError:
    """Counted in the metrics; the client does not get it. nginx has the same status for this."""
    return ApiError(499, "the client has hung up", code="client_disconnected")


def stopping() -> ApiError:
    """For requests that cannot be answered because the server is shutting down."""
    return ApiError(503, "the server is shutting down", code="engine_stopped", headers={"Connection": "close"})
