"""Who may talk to the server? Checked before anything of a request's body is read.

A web page in a browser can send requests to a server on the same machine, under a name of its own that it has let
point there (DNS rebinding). It cannot do so under an IP address or "localhost"; other names have to be allowed. There
are no CORS headers, so a browser keeps answers from pages of other sites.
"""

import hmac
import ipaddress
import re
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmfusion.serving.errors import ApiError

OPEN_PATHS = ("/healthz",)
"""For which no key is needed."""


_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:@/\s]+))(?::\d*)?")


class Guard:
    """ASGI middleware that checks the Host header and the API key.

    allowed_hosts: names besides localhost. api_key: what "Authorization: Bearer ..." must hold; None: no key.
    on_status: told the HTTP status of every answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        allowed_hosts: Collection[str] = (),
        api_key: str | None = None,
        on_status: Callable[[int], None],
    ) -> None:
        self._app = app
        self._allowed_hosts = {"localhost", *(name.lower().rstrip(".") for name in allowed_hosts)}
        self._api_key = None if api_key is None else api_key.encode()
        self._on_status = on_status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._on_status(message["status"])
            await send(message)

        try:
            self._check(Headers(scope=scope), scope["path"])
        except ApiError as error:
            await error.response()(scope, receive, counting)
        else:
            await self._app(scope, receive, counting)

    def _check(self, headers: Headers, path: str) -> None:
        host = host_name(headers.get("host", ""))
        if host not in self._allowed_hosts and not _is_address(host):
            message = f"the host {host!r} is not allowed; start the server with --allow-host {host or 'NAME'}"
            raise ApiError(400, message, code="host_not_allowed")
        if self._api_key is None or path in OPEN_PATHS:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if not (scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), self._api_key)):
            message = 'the API key is missing or wrong; send the header "Authorization: Bearer KEY"'
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def host_name(header: str) -> str:
    """The name or address in a Host header, without port, brackets and final dot; "" for a malformed one."""
    match = _HOST.fullmatch(header.strip().lower())
    return "" if match is None else (match[1] or match[2]).rstrip(".")


def is_loopback(host: str) -> bool:
    """Whether `host` can be reached from this machine alone."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
