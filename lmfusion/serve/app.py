"""Which URLs are there, and what is behind them? The chat API, the model's name, health and metrics.

Bodies are read only where there is a place in the queue for them, and worked on in a few threads of their own: decoding
somebody's image never holds up the others' streams.
"""

import asyncio
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from lmfusion import __version__
from lmfusion.generation.worker import Busy, EngineWorker, Stopped
from lmfusion.serve.errors import ApiError
from lmfusion.serve.guard import Guard
from lmfusion.serve.metrics import CONTENT_TYPE, Metrics
from lmfusion.serve.requests import RequestReader, from_options
from lmfusion.serve.schema import ChatRequest
from lmfusion.serve.streaming import Listener, Streamed, Whole

CHAT_PATH = "/v1/chat/completions"
BODY_SECONDS = 60.0
"""A client that has not sent its request by then is not waited for."""
RETRY_SECONDS = 2
"""What a client that finds the queue full is told to wait."""
NUM_READERS = 4
"""Bodies worked on at a time; each may hold one decoded image of the largest size allowed."""


@dataclass
class _Reading:
    """Requests that have been let in and are not submitted yet."""

    num_requests: int = 0


def build_app(
    worker: EngineWorker,
    reader: RequestReader,
    *,
    api_key: str | None = None,
    allowed_hosts: Collection[str] = (),
) -> FastAPI:
    """The ASGI application. api_key: what clients must send; None: nothing. allowed_hosts: see `Guard`."""
    # Without /docs: that page has browsers load scripts from other hosts
    app = FastAPI(title="lmfusion", version=__version__, docs_url=None, redoc_url=None)
    metrics = Metrics()
    reading = _Reading()
    readers = CapacityLimiter(NUM_READERS)
    model_card = dict(id=reader.model_name, object="model", created=int(time.time()), owned_by="lmfusion")
    app.add_middleware(Guard, allowed_hosts=allowed_hosts, api_key=api_key, on_status=metrics.count_status)

    @app.post(CHAT_PATH)
    async def chat(http: Request) -> Response:
        if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # also what keeps web pages of other sites out: browsers ask before they send JSON there
            raise ApiError(415, 'the content type must be "application/json"', code="unsupported_media_type")
        if worker.stats().num_waiting + reading.num_requests >= worker.max_waiting:
            raise _busy(f"{worker.max_waiting} requests are waiting, and no more may; try again in a few seconds")
        listener = Listener(metrics)
        reading.num_requests += 1
        try:
            body = await _read_body(http, reader.limits.max_body_bytes)
            request, prompt, options = await run_sync(reader.read, body, limiter=readers)
        finally:
            reading.num_requests -= 1
        try:
            answering = await run_sync(worker.submit, prompt, options, listener)
        except Busy as error:
            raise _busy(str(error)) from None
        except Stopped as error:
            raise ApiError(503, str(error), code="engine_stopped") from None
        except ValueError as error:
            raise from_options(error) from None
        answer = (f"chatcmpl-{uuid.uuid4().hex}", reader.model_name, answering, listener)
        if not request.stream:
            return Whole(*answer)
        with_usage = request.stream_options is not None and bool(request.stream_options.include_usage)
        return Streamed(*answer, with_usage=with_usage)

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [model_card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, object]:
        if name != reader.model_name:
            message = f"the model {name!r} is not served here; this is {reader.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return model_card

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        problem = worker.stats().problem
        if problem:
            return JSONResponse({"status": "unready", "reason": problem}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def prometheus() -> PlainTextResponse:
        return PlainTextResponse(metrics.render(worker.stats()), media_type=CONTENT_TYPE)

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def on_http_error(http: Request, error: HTTPException) -> Response:
        message = f"{http.method} {http.url.path}: {error.detail}"
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def on_failure(_: Request, __: Exception) -> Response:
        return ApiError(500, "the server failed at this request; its log tells why").response()

    _document(app)
    return app


def _busy(message: str) -> ApiError:
    return ApiError(429, message, code="queue_full", headers={"Retry-After": str(RETRY_SECONDS)})


async def _read_body(http: Request, max_bytes: int) -> bytes:
    """The body, given up as soon as it is too large or too slow.

    What a client still sends of it is thrown away, so that it comes to read the answer.
    """
    message = f"the request has more than {max_bytes} bytes, which is the limit here"
    too_large = ApiError(413, message, code="request_too_large")
    length = http.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in http.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        message = f"the request was not complete after {BODY_SECONDS:.0f} seconds"
        raise ApiError(408, message, code="timeout", headers={"Connection": "close"}) from None
    return bytes(body)


def _document(app: FastAPI) -> None:
    """Put the request into /openapi.json; FastAPI does not know it, as the body is parsed in a thread."""
    schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = schema.pop("$defs")
    document = app.openapi()
    document["components"]["schemas"] |= {**parts, "ChatRequest": schema}
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}}
    document["paths"][CHAT_PATH]["post"]["requestBody"] = {"required": True, "content": content}
