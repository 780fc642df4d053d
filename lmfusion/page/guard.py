"""Which requests does the page refuse? Those that would have the server fetch what it does not own.

gradio relays files of other machines, and downloads those that a message names; nothing on this page needs that.
Browsers are told to load nothing from elsewhere, also where an answer links a picture there.
"""

import json
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""Of a request that is no upload."""
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; frame-ancestors 'self'"
)
HEADERS = [
    (b"content-security-policy", CONTENT_POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]
_FETCHES = re.compile(r"/(?:file|proxy)=\s*[a-z][a-z0-9+.-]*:/", re.IGNORECASE)
_ADDRESS = re.compile(r"\s*https?:", re.IGNORECASE)


class Guard:
    """ASGI middleware that refuses requests which name an address to fetch, and adds HEADERS to all answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        if _FETCHES.search(scope["path"]):
            await _refuse(send_with_headers, 403, "addresses of other machines are not fetched")
            return
        kind = dict(scope["headers"]).get(b"content-type", b"")
        if scope["method"] == "POST" and not kind.startswith(b"multipart/form-data"):
            body = await _read(receive)
            if body is None:
                await _refuse(send_with_headers, 413, f"the limit of a request is {MAX_REQUEST_BYTES} bytes")
                return
            if names_address(body):
                await _refuse(send_with_headers, 403, "addresses of other machines are not fetched")
                return
            receive = _replay(body, receive)
        await self._app(scope, receive, send_with_headers)


def names_address(body: bytes) -> bool:
    """Whether JSON has a "path" that is an address in the web, which gradio would download."""
    try:
        pending = [json.loads(body)]
    except ValueError:
        return False  # gradio refuses it, too
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            path = item.get("path")
            if isinstance(path, str) and _ADDRESS.match(path):
                return True
            pending += item.values()
        elif isinstance(item, list):
            pending += item
    return False


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


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
