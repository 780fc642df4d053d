"""Reads request bodies within limits of size, time and memory."""

import asyncio
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from lmfusion.serving.errors import ApiError, client_disconnected, queue_full, shutting_down

BODY_SECONDS = 60.0
"""Time within which a body must be complete."""
GRACE_SECONDS = 10.0
"""Time after which the minimum rate applies."""
MIN_BYTES_PER_SECOND = 8 * 1024
"""Minimum rate of a body after the grace time."""


@dataclass(eq=False)
class _Body:
    """A body that is being received."""

    deadline: asyncio.Timeout
    start: float
    num_bytes: int = 0
    error: ApiError | None = None
    """Why it was dropped before its deadline."""


class BodyReader:
    """Reads the bodies of an app's requests. Use it in the event loop's thread only.

    Clients that send nothing must not lock out others. So when too many bodies, or too many bytes, are being received
    at the same time, the oldest body is dropped with a 429.

    Args:
        max_bytes: size of one body.
        max_bodies: number of bodies being received at the same time.
        max_total_bytes: size of all bodies being received.
    """

    def __init__(self, max_bytes: int, max_bodies: int, max_total_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._max_bodies = max_bodies
        self._max_total_bytes = max_total_bytes
        self._num_bytes = 0
        self._receiving: dict[_Body, None] = {}  # the oldest first

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """Return the request's body.

        Raises:
            ApiError: as soon as the body is too large or too slow, or the client has disconnected.
        """
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > self._max_bytes:
            raise self._too_large()
        start = asyncio.get_running_loop().time()
        body: _Body | None = None
        try:
            async with asyncio.timeout(min(GRACE_SECONDS, BODY_SECONDS)) as deadline:
                body = _Body(deadline, start)
                self._receiving[body] = None
                self._make_room()
                return await self._receive(receive, body)
        except TimeoutError:
            if body is not None and body.error is not None:
                raise body.error from None
            message = (
                f"a request must be complete within {BODY_SECONDS:g} seconds and arrive at {MIN_BYTES_PER_SECOND} "
            )
            message += f"bytes per second or more after {GRACE_SECONDS:g} seconds; this one was too slow"
            raise ApiError(408, message, code="timeout", headers={"Connection": "close"}) from None
        finally:
            if body is not None:
                self._remove(body)

    def close(self) -> None:
        """Drop all bodies that are being received."""
        for body in list(self._receiving):
            self._drop(body, shutting_down())

    async def _receive(self, receive: Receive, body: _Body) -> bytes:
        chunks = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise client_disconnected()
            chunk = message.get("body", b"")
            chunks += chunk
            if len(chunks) > self._max_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(chunks)
            if body in self._receiving:
                body.num_bytes += len(chunk)
                self._num_bytes += len(chunk)
                seconds = min(BODY_SECONDS, GRACE_SECONDS + len(chunks) / MIN_BYTES_PER_SECOND)
                body.deadline.reschedule(body.start + seconds)
                self._make_room()

    def _make_room(self) -> None:
        while len(self._receiving) > self._max_bodies or self._num_bytes > self._max_total_bytes:
            message = "too many requests are being sent, and this one has taken the longest; try again in a few seconds"
            self._drop(next(iter(self._receiving)), queue_full(message))

    def _drop(self, body: _Body, error: ApiError) -> None:
        """Make `read` raise `error`. Its task may be anywhere in `receive`, so its deadline is used to wake it."""
        self._remove(body)
        if not body.deadline.expired():
            body.error = error
            body.deadline.reschedule(0)

    def _remove(self, body: _Body) -> None:
        if body in self._receiving:
            del self._receiving[body]
            self._num_bytes -= body.num_bytes

    def _too_large(self) -> ApiError:
        message = f"a request must have at most {self._max_bytes} bytes, got more; send fewer or smaller images"
        return ApiError(413, message, code="request_too_large")
