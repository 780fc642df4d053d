"""Middleware that passes only the page's own requests to gradio, and none that makes the server fetch an address.

gradio has many more routes than the page uses: it relays files of other machines, converts recordings, and keeps any
file that is uploaded. The middleware answers only the routes in ROUTES and stops browsers from loading anything from
elsewhere. Uploads have their own checks in lmfusion.serving.page.uploads.
"""

import json
import re
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmfusion.serving.bodies import BodyReader
from lmfusion.serving.connections import MAX_CONNECTIONS
from lmfusion.serving.errors import ApiError
from lmfusion.serving.page.uploads import UPLOAD_PATH, Uploads, respond

MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""Size of a request that is not an upload."""
MAX_TOTAL_BYTES = 64 * MAX_REQUEST_BYTES
"""Size of all such requests that are being received at the same time."""
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
"""The requests of the page in the browser: by method, regular expressions of paths. All others are refused."""
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


class NoFetchMiddleware:
    """ASGI middleware that refuses requests that the page does not make, and adds HEADERS to all answers.

    Args:
        folder: where gradio stores uploads.
    """

    def __init__(self, app: ASGIApp, *, folder: Path) -> None:
        self._app = app
        self._uploads = Uploads(app, folder)
        self._bodies = BodyReader(MAX_REQUEST_BYTES, MAX_CONNECTIONS, MAX_TOTAL_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [
                    item for item in message.get("headers", []) if not item[0].lower().startswith(b"access-control-")
                ]
                message["headers"] = [*kept, *HEADERS]
            await send(message)

        try:
            _check_path(scope["method"], scope["path"])
            if scope["method"] != "POST":
                await self._app(scope, receive, send_with_headers)
            elif scope["path"] == UPLOAD_PATH:
                await self._uploads(scope, receive, send_with_headers)
            else:
                body = await self._bodies.read(scope, receive)
                _check_json(body)
                await self._app(scope, _replay(body, receive), send_with_headers)
        except ApiError as error:
            await respond(error, scope, receive, send_with_headers)


def _check_path(method: str, path: str) -> None:
    if _FETCHES.search(path):
        raise _no_fetch()
    if method not in _ALLOWED or not _ALLOWED[method].fullmatch(path):
        raise ApiError(404, "the page has nothing at this path", code="not_found")


def _check_json(body: bytes) -> None:
    """Raise ApiError for a body that the page would not send.

    gradio copies a body that it refuses into its answer. Python's parser accepts NaN, infinity and lone surrogates,
    none of which can be written in an answer, so such a body would end in a 500.
    """
    try:
        value = json.loads(body.decode())  # decoded here, because json.loads also takes UTF-16 and UTF-32
        is_too_deep = is_deep(value)
        if not is_too_deep:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise ApiError(
            400, "the body must be JSON with finite numbers and valid Unicode", code="invalid_json"
        ) from None
    if is_too_deep:
        raise ApiError(
            400, f"the body must have at most {MAX_JSON_DEPTH} levels of JSON, got more", code="invalid_json"
        )
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, got {type(value).__name__}", code="invalid_json")
    if names_address(value):
        raise _no_fetch()


def _no_fetch() -> ApiError:
    return ApiError(403, "addresses of other machines are not fetched; upload the image itself", code="no_fetch")


def is_deep(value: Any) -> bool:
    """Whether JSON is nested in more than MAX_JSON_DEPTH levels."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [inner for item in level for inner in _children(item)]
        if not level:
            return False
    return True


def names_address(value: Any) -> bool:
    """Whether JSON has a "path" that is a web address, which gradio would download."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            path = item.get("path")
            if isinstance(path, str) and _ADDRESS.match(path):
                return True
        pending += _children(item)
    return False


def _children(item: Any) -> list[Any]:
    if isinstance(item, dict):
        return list(item.values())
    return item if isinstance(item, list) else []


def _replay(body: bytes, receive: Receive) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
