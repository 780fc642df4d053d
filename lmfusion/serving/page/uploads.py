"""Uploads to the page: pictures of known formats, of bounded size, of which the oldest make room for new ones.

gradio stores whatever is uploaded before the page sees it. The limits are checked around its route: by the announced
length before anything is read, and by the first bytes of the stored files before the browser learns their paths.
"""

import json
import os
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmfusion.images.formats import JPEG_SIGNATURE, PNG_SIGNATURE

UPLOAD_PATH = "/gradio_api/upload"
MAX_UPLOAD_BYTES = 32 * 1024 * 1024
"""Of one picture."""
MAX_UPLOAD_REQUEST_BYTES = 4 * MAX_UPLOAD_BYTES
"""Of the pictures that are added at the same time."""
MAX_STORED_BYTES = 1024 * 1024 * 1024
"""Of all uploads that are kept, of all tabs. An upload is needed until its message is sent."""


async def refuse(send: Send, status: int, reason: str) -> None:
    """Answer with an error."""
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Uploads:
    """The ASGI app behind UPLOAD_PATH: gradio's own, with limits. folder: where gradio puts uploads."""

    def __init__(self, app: ASGIApp, folder: Path) -> None:
        self._app = app
        self._folder = folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        # The server ends a body at the length that was announced, unless the body is chunked
        if not length.isdecimal() or "transfer-encoding" in headers:
            await refuse(send, 411, "an upload must announce its length")
            return
        if int(length) > MAX_UPLOAD_REQUEST_BYTES:
            await refuse(send, 413, f"the limit of an upload is {MAX_UPLOAD_REQUEST_BYTES} bytes")
            return
        make_room(self._folder, int(length))
        answer: list[Message] = []

        async def keep(message: Message) -> None:
            answer.append(message)

        await self._app(scope, receive, keep)  # which has moved the files to their places when it returns
        if answer and answer[0]["status"] == 200:
            body = b"".join(message.get("body", b"") for message in answer[1:])
            files = [Path(name) for name in json.loads(body)]
            if any(not is_picture(file) for file in files):
                for file in files:
                    file.unlink(missing_ok=True)
                await refuse(send, 415, "pictures must be JPEG, PNG or WEBP files")
                return
        for message in answer:
            await send(message)


def is_picture(file: Path) -> bool:
    """Whether a file begins as JPEG, PNG and WEBP files do."""
    try:
        with open(file, "rb") as opened:
            begin = opened.read(12)
    except OSError:
        return False
    return begin.startswith((JPEG_SIGNATURE, PNG_SIGNATURE)) or (begin[:4] == b"RIFF" and begin[8:] == b"WEBP")


def make_room(folder: Path, num_bytes: int) -> None:
    """Delete the oldest files below `folder` until `num_bytes` more make no more than MAX_STORED_BYTES."""
    files = []
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            try:
                status = path.stat()
            except FileNotFoundError:  # moved by another upload
                continue
            files.append((status.st_mtime_ns, status.st_size, path))
    stored = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if stored + num_bytes <= MAX_STORED_BYTES:
            return
        path.unlink(missing_ok=True)
        stored -= size
