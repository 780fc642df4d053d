"""What does a client learn when something is wrong? OpenAI's error body, which its clients turn into exceptions."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from lmfusion.utils.config_values import truncate

MAX_MESSAGE = 500
"""Characters; an error quotes what was sent, which may be long."""
MAX_PARAM = 100
"""Characters of the path of a field, which may be unknown and long."""

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
"""By HTTP status; everything else is an "invalid_request_error"."""


class ApiError(Exception):
    """A request that is answered with an error. param: the field at fault; code: the reason for programs."""

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
