"""Middleware that passes on to gradio only the requests that the page itself makes, and limits their size.

gradio has many more routes than the page uses: it relays files of other machines, converts recordings, and keeps any
file that is uploaded. The middleware here answers only the routes in ROUTES, only for the page's own origin, and lets
browsers load nothing from elsewhere. Uploads have their own checks in lmfusion.serving.page.uploads.
"""

import asyncio
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmfusion.serving.guard import host_name
from lmfusion.serving.page.uploads import UPLOAD_PATH, Uploads, refuse

MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""Of a request that is no upload."""
BODY_SECONDS = 60.0
"""In which such a request must be there."""
MAX_JSON_DEPTH = 64
"""Levels of nesting; the page's own requests have fewer than ten."""
ROUTES = {
    "GET": (
        "/", "/config", "/theme.css", "/manifest.json", "/favicon.ico", "/robots.txt", "/assets/.+", "/static/.+",
        "/svelte/.+", "/gradio_api/file=.+", "/gradio_api/heartbeat/[^/]+", "/gradio_api/queue/data",
        "/gradio_api/upload_progress", "/gradio_api/startup-events",
    ),
    "HEAD": ("/", "/gradio_api/file=.+"),
    "POST": (
        "/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/cancel", "/gradio_api/reset", UPLOAD_PATH,
    ),
}  # fmt: skip
"""What the page in the browser asks for, by method, as regular expressions of paths. Everything else is refused."""
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'self'"
)
HEADERS = [
    (b"content-security-policy", CONTENT_POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]
_ALLOWED = {method: re.compile("|".join(paths)) for method, paths in ROUTES.items()}
_FETCHES = re.compile(r"/file=\s*[a-z][a-z0-9+.-]*:/", re.IGNORECASE)
_ADDRESS = re.compile(r"\s*https?:", re.IGNORECASE)


class PageGuard:
    """ASGI middleware that refuses what the page does not ask for, and adds HEADERS to all answers.

    folder: where gradio puts uploads. allowed_hosts: names by which the page may be called, such as that of a proxy.
    """

    def __init__(self, app: ASGIApp, *, folder: Path, allowed_hosts: Collection[str] = ()) -> None:
        self._app = app
        self._uploads = Uploads(app, folder)
        self._allowed_hosts = {name.lower().rstrip(".") for name in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_checked(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [
                    item for item in message.get("headers", []) if not item[0].lower().startswith(b"access-control-")
                ]
                message["headers"] = [*kept, *HEADERS]
            await send(message)

        headers = Headers(scope=scope)
        if refusal := self._refusal(scope["method"], scope["path"], headers):
            await refuse(send_checked, *refusal)
        elif scope["method"] == "POST" and scope["path"] == UPLOAD_PATH:
            await self._uploads(scope, receive, send_checked)
        elif scope["method"] == "POST":
            await self._pass_json(scope, receive, send_checked)
        else:
            await self._app(scope, receive, send_checked)

    def _refusal(self, method: str, path: str, headers: Headers) -> tuple[int, str] | None:
        """The status and reason to refuse a request with, from its first lines; None for one that may go on."""
        if not self._is_from_page(method, headers):
            return 403, "this request comes from another site; open the page itself"
        if _FETCHES.search(path):
            return 403, "addresses of other machines are not fetched"
        if method not in _ALLOWED or not _ALLOWED[method].fullmatch(path):
            return 404, "the page has nothing at this path"
        return None

    def _is_from_page(self, method: str, headers: Headers) -> bool:
        """Whether no browser sent the request for a page of another origin.

        Browsers say so in Sec-Fetch-Site, and in Origin wherever an answer could be read or a body is sent. Following a
        link to the page from elsewhere is allowed. Programs that are no browsers send neither.
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
        return host_name(authority) in self._allowed_hosts

    async def _pass_json(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _read(receive)
        except TimeoutError:
            await refuse(send, 408, f"the request did not come within {BODY_SECONDS:g} seconds")
            return
        if body is None:
            await refuse(send, 413, f"the limit of a request is {MAX_REQUEST_BYTES} bytes")
            return
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            await refuse(send, 400, "the request must be JSON")
            return
        if is_deep(value):
            await refuse(send, 400, f"the JSON of a request must have at most {MAX_JSON_DEPTH} levels")
        elif names_address(value):
            await refuse(send, 403, "addresses of other machines are not fetched")
        else:
            await self._app(scope, _replay(body, receive), send)


def is_deep(value: Any) -> bool:
    """Whether JSON is nested in more than MAX_JSON_DEPTH levels."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [inner for item in level for inner in _inner(item)]
        if not level:
            return False
    return True


def names_address(value: Any) -> bool:
    """Whether JSON has a "path" that is an address in the web, which gradio would download."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            path = item.get("path")
            if isinstance(path, str) and _ADDRESS.match(path):
                return True
        pending += _inner(item)
    return False


def _inner(item: Any) -> list[Any]:
    if isinstance(item, dict):
        return list(item.values())
    return item if isinstance(item, list) else []


async def _read(receive: Receive) -> bytes | None:
    """The body of a request; None for one that is too long, or whose sender has gone."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] != "http.request" or len(body) > MAX_REQUEST_BYTES:
            return None
        if not message.get("more_body", False):
            return body


def _replay(body: bytes, receive: Receive) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
