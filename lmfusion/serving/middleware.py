"""Middleware that checks who may call a server: the host, the API key and the origin, before a body is read.

A web page in a browser can send requests to a server on the same machine, under a name of the page's own that it lets
point there (DNS rebinding). It cannot do so under an IP address or "localhost", so other names have to be allowed.
There are no CORS headers: browsers do not show answers to pages of other sites.
"""

import hmac
import ipaddress
import re
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmfusion.serving.errors import ApiError

OPEN_PATHS = ("/healthz",)
"""Paths that need no key."""

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:@/\s]+))(?::\d*)?")


class HostAndKeyMiddleware:
    """ASGI middleware that checks the Host header, the API key, and where asked to, the origin.

    Args:
        allowed_hosts: names by which the server may be called, besides localhost and IP addresses.
        api_key: what "Authorization: Bearer ..." must contain; None: no key is needed.
        same_origin: refuse requests that a browser sends for a page of another origin.
        on_status: called with the HTTP status of each response.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        allowed_hosts: Collection[str] = (),
        api_key: str | None = None,
        same_origin: bool = False,
        on_status: Callable[[int], None] = lambda status: None,
    ) -> None:
        self._app = app
        self._allowed_hosts = {name.lower().rstrip(".") for name in allowed_hosts}
        self._api_key = None if api_key is None else api_key.encode()
        self._same_origin = same_origin
        self._on_status = on_status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._on_status(message["status"])
            await send(message)

        try:
            self._check(scope["method"], scope["path"], Headers(scope=scope))
        except ApiError as error:
            await error.response()(scope, receive, send_counted)
        else:
            await self._app(scope, receive, send_counted)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        host = host_name(headers.get("host", ""))
        if host != "localhost" and host not in self._allowed_hosts and not _is_address(host):
            message = f"the host must be localhost, an IP address or an allowed name, got {host!r}; "
            message += f"start the server with --allow-host {host or 'NAME'}"
            raise ApiError(400, message, code="host_not_allowed")
        if self._same_origin and not _is_same_origin(method, headers, self._allowed_hosts):
            raise ApiError(403, "this request comes from another site; open the page itself", code="cross_origin")
        if self._api_key is None or path in OPEN_PATHS:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if not (scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), self._api_key)):
            message = 'the API key is missing or wrong; send the header "Authorization: Bearer KEY"'
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _is_same_origin(method: str, headers: Headers, allowed_hosts: Collection[str]) -> bool:
    """Whether a request comes from a page of this server, or from no browser.

    Browsers name the origin in Sec-Fetch-Site, and in Origin whenever a page could read the answer or sends a body.
    Programs other than browsers send neither header. Following a link from another site is allowed.
    """
    site = headers.get("sec-fetch-site", "none")
    is_navigation = method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
    if site not in ("same-origin", "none") and not is_navigation:
        return False
    origin = headers.get("origin")
    if origin is None:
        return True
    scheme, _, authority = origin.lower().partition("://")
    host = headers.get("host", "").lower()
    if scheme not in ("http", "https") or not host_name(authority):
        return False
    if host_name(authority) == host_name(host):  # another port is another program
        return authority == host
    return host_name(authority) in allowed_hosts


def host_name(header: str) -> str:
    """The name or address in a Host header, without port, brackets and final dot; "" if the header is malformed."""
    match = _HOST.fullmatch(header.strip().lower())
    return "" if match is None else (match[1] or match[2]).rstrip(".")


def is_loopback(host: str) -> bool:
    """Whether `host` can be reached from this machine only."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
