"""Sends an answer to its client: as one JSON body, or as server-sent events while it is generated.

Events come from the engine's thread; the client may be slow, or disconnect. Both kinds of response cancel the request
as soon as the client disconnects.
"""

import asyncio
import base64
import io
import json
import time
from abc import ABC, abstractmethod
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from anyio.to_thread import run_sync
from PIL import Image
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from lmfusion.generation.events import Done, Event, ImageBegin, ImageEnd, ImagePreview, TextDelta
from lmfusion.serving.errors import ApiError
from lmfusion.serving.http.disconnects import while_connected

if TYPE_CHECKING:
    from lmfusion.generation.worker import ResponseStream
    from lmfusion.serving.http.metrics import ServerMetrics

KEEP_ALIVE_SECONDS = 15.0
"""Time without an event after which a comment is sent, because proxies close idle connections."""


class EventListener:
    """A queue of one answer's events. Call it in any thread, and await `next` in the event loop's thread.

    It holds the events that were not sent yet. A new preview replaces an unsent preview of the same image, so that the
    queue of a slow client does not grow with the number of steps.
    """

    def __init__(self, metrics: "ServerMetrics") -> None:
        self._loop = asyncio.get_running_loop()
        self._metrics = metrics
        self._start = time.monotonic()
        self._has_started = False
        self._events: deque[Event] = deque()
        self._wake = asyncio.Event()

    def __call__(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._put, event)

    async def next(self) -> Event:
        while not self._events:
            self._wake.clear()
            await self._wake.wait()
        return self._events.popleft()

    def _put(self, event: Event) -> None:
        seconds = time.monotonic() - self._start
        if not self._has_started and isinstance(event, TextDelta | ImageBegin):
            self._has_started = True
            self._metrics.first_event.observe(seconds)
        if isinstance(event, Done):
            self._metrics.latency.observe(seconds)
        last = self._events[-1] if self._events else None
        if isinstance(event, ImagePreview) and isinstance(last, ImagePreview) and last.index == event.index:
            self._events.pop()
        self._events.append(event)
        self._wake.set()


class _ChatResponse(Response, ABC):
    """An ASGI response with the events of `stream`. It cancels `stream` when the client disconnects."""

    def __init__(self, completion_id: str, model_name: str, stream: "ResponseStream", listener: EventListener) -> None:
        self.background = None
        self._stream = stream
        self._listener = listener
        self._head = {"id": completion_id, "created": int(time.time()), "model": model_name}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ApiError):  # the client has disconnected
                await while_connected(receive, self._send(scope, receive, send))
        finally:
            self._stream.cancel()  # has no effect if it is finished

    @abstractmethod
    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None: ...


class CompletionResponse(_ChatResponse):
    """One `chat.completion` object. message.content is the text, message.parts the text and images in order."""

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts: list[dict[str, Any]] = []
        while not isinstance(event := await self._listener.next(), Done):
            match event:
                case TextDelta(text) if parts and parts[-1]["type"] == "text":
                    parts[-1]["text"] += text
                case TextDelta(text):
                    parts.append({"type": "text", "text": text})
                case ImageEnd(_, image, settings):
                    url = {"url": await run_sync(data_url, image)}
                    parts.append({"type": "image_url", "image_url": url, "settings": settings})
        if event.finish_reason == "error":
            await generation_error(event).response()(scope, receive, send)
            return
        text = "".join(part.get("text", "") for part in parts)
        message = {"role": "assistant", "content": text, "parts": parts}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": event.finish_reason}
        body = {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage(event)}
        await JSONResponse(body)(scope, receive, send)


class StreamedCompletionResponse(_ChatResponse):
    """`chat.completion.chunk` objects as server-sent events, then [DONE].

    Text is in delta.content, images are in delta.image. with_usage: send the token counts in a last chunk.
    """

    def __init__(self, *answer: Any, with_usage: bool) -> None:
        super().__init__(*answer)
        self._with_usage = with_usage

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        raw = [(name.encode(), value.encode()) for name, value in (headers | {"x-accel-buffering": "no"}).items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})

        async def write(text: str, more_body: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more_body})

        await write(self._chunk({"role": "assistant", "content": ""}))
        while not isinstance(event := await self._next(write), Done):
            await write(self._chunk(await _delta(event)))
        if event.finish_reason == "error":
            await write(_data(generation_error(event).body()))
        else:
            await write(self._chunk({}, event.finish_reason))
        if self._with_usage:
            await write(_data({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(event)}))
        await write("data: [DONE]\n\n", more_body=False)

    async def _next(self, write: Any) -> Event:
        while True:
            try:
                async with asyncio.timeout(
                    KEEP_ALIVE_SECONDS
                ):  # not wait_for, which may lose a cancellation in Python 3.11
                    return await self._listener.next()
            except TimeoutError:
                await write(": keep-alive\n\n")

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _data({**self._head, "object": "chat.completion.chunk", "choices": [choice]})


async def _delta(event: Event) -> dict[str, Any]:
    match event:
        case TextDelta(text):
            return {"content": text}
        case ImageBegin(index, width, height, num_steps):
            return {"image": dict(event="begin", index=index, width=width, height=height, num_steps=num_steps)}
        case ImagePreview(index, step, num_steps, image):
            url = await run_sync(data_url, image)
            return {"image": dict(event="preview", index=index, step=step, num_steps=num_steps, url=url)}
        case ImageEnd(index, image, settings):
            url = await run_sync(data_url, image)
            return {"image": dict(event="end", index=index, url=url, settings=settings)}
    raise AssertionError(f"unexpected event {event}")


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def data_url(image: Image.Image) -> str:
    """The image as a PNG in a data: URL."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def usage(done: Done) -> dict[str, int]:
    """Token counts with OpenAI's names, and the number of images. prompt_tokens includes the tokens of images."""
    return {
        "prompt_tokens": done.num_prompt_tokens,
        "completion_tokens": done.num_new_tokens,
        "total_tokens": done.num_prompt_tokens + done.num_new_tokens,
        "images": done.num_images,
    }


def generation_error(done: Done) -> ApiError:
    """The error of an answer that failed."""
    return ApiError(500, done.error or "generation failed", code="generation_failed")
