"""Limits of uploads to the page: images of known formats and bounded size; the oldest are deleted for new ones.

gradio stores an upload before the page sees it. So the limits are checked around gradio's route: the announced length
before anything is read, and the first bytes of the stored files before the browser gets their paths.
"""

import json
import os
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmfusion.images.formats import format_of
from lmfusion.serving.errors import ApiError

UPLOAD_PATH = "/gradio_api/upload"
MAX_UPLOAD_BYTES = 32 * 1024 * 1024
"""Size of one image."""
MAX_UPLOAD_REQUEST_BYTES = 4 * MAX_UPLOAD_BYTES
"""Size of all images of one request."""
MAX_STORED_BYTES = 1024 * 1024 * 1024
"""Size of all stored uploads, of all tabs. An upload is needed until its message is sent."""


async def respond(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error. gradio's script in the browser shows the text in "detail"."""
    body = {**error.body(), "detail": error.message}
    await JSONResponse(body, error.status, error.headers)(scope, receive, send)


class Uploads:
    """The ASGI app behind UPLOAD_PATH: gradio's own, with limits.

    Args:
        folder: where gradio stores uploads.
    """

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self._app = app
        self._folder = folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError for an upload that is refused."""
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        # The server ends a body at the announced length unless the body is chunked.
        if not length.isdecimal() or "transfer-encoding" in headers:
            raise ApiError(411, "an upload must have a Content-Length header and no Transfer-Encoding")
        if int(length) > MAX_UPLOAD_REQUEST_BYTES:
            message = (
                f"an upload must have at most {MAX_UPLOAD_REQUEST_BYTES} bytes, got {length}; scale the images down"
            )
            raise ApiError(413, message, code="request_too_large")
        make_room(self._folder, int(length))
        answer: list[Message] = []

        async def keep(message: Message) -> None:
            answer.append(message)

        await self._app(scope, receive, keep)  # when it returns, it has moved the files to their places
        if answer and answer[0]["status"] == 200:
            body = b"".join(message.get("body", b"") for message in answer[1:])
            files = [Path(name) for name in json.loads(body)]
            if any(not is_image(file) for file in files):
                for file in files:
                    file.unlink(missing_ok=True)
                raise ApiError(415, "images must be JPEG, PNG or WEBP files", code="unsupported_media_type")
        for part in answer:
            await send(part)


def is_image(file: Path) -> bool:
    """Whether a file begins as JPEG, PNG and WEBP files do."""
    try:
        with open(file, "rb") as opened:
            begin = opened.read(12)
    except OSError:
        return False
    return format_of(begin) is not None


def make_room(folder: Path, num_bytes: int) -> None:
    """Delete the oldest files in `folder` until `num_bytes` more fit within MAX_STORED_BYTES."""
    files = []
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            try:
                status = path.stat()
            except FileNotFoundError:  # another upload has moved it
                continue
            files.append((status.st_mtime_ns, status.st_size, path))
    stored = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if stored + num_bytes <= MAX_STORED_BYTES:
            return
        path.unlink(missing_ok=True)
        stored -= size
