"""API errors with OpenAI's error body, which OpenAI's clients turn into exceptions."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from lmfusion.utils.config_values import truncate

MAX_MESSAGE = 500
"""Length of an error message in characters. Messages quote the request, which may be long."""
MAX_PARAM = 100
"""Length of a field's path in characters. The field may be unknown and its name long."""
RETRY_SECONDS = 2
"""Retry-After of a server that is full, in seconds."""

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
"""Error types by HTTP status. The type of any other status is "invalid_request_error"."""


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: for people.
        param: path of the field at fault, such as "messages[0].content".
        code: the reason, for programs.
        headers: additional headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = truncate(message, MAX_MESSAGE)
        self.param = None if param is None else truncate(param, MAX_PARAM)
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}"""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def queue_full(message: str) -> ApiError:
    """429: the client should try again later."""
    return ApiError(429, message, code="queue_full", headers={"Retry-After": str(RETRY_SECONDS)})


def client_disconnected() -> ApiError:
    """499, as in nginx. It is counted in the metrics; the client does not receive it."""
    return ApiError(499, "the client disconnected", code="client_disconnected")


def shutting_down() -> ApiError:
    """503: the server is shutting down."""
    return ApiError(503, "the server is shutting down", code="engine_stopped", headers={"Connection": "close"})
