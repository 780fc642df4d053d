"""Which URLs are there, and what is behind them? The chat API, the model's name, health and metrics.

Bodies are worked on in a few threads of their own: decoding somebody's image never holds up the others' streams.
"""

import time
import uuid
from collections.abc import Collection

from anyio.to_thread import run_sync
from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from lmfusion import __version__
from lmfusion.generation.worker import EngineWorker, QueueFull, Stopped
from lmfusion.serving.errors import ApiError
from lmfusion.serving.guard import Guard
from lmfusion.serving.http.bodies import Bodies, busy
from lmfusion.serving.http.body_readers import Readers, while_connected
from lmfusion.serving.http.metrics import CONTENT_TYPE, Metrics
from lmfusion.serving.http.openapi import document
from lmfusion.serving.http.requests import RequestReader, from_options
from lmfusion.serving.http.streaming import Listener, Streamed, Whole

CHAT_PATH = "/v1/chat/completions"
BODIES_PER_PLACE = 4
"""Bodies that may be on their way for each place in the queue. They take no place before they are complete."""


def build_app(
    worker: EngineWorker,
    reader: RequestReader,
    *,
    api_key: str | None = None,
    allowed_hosts: Collection[str] = (),
) -> FastAPI:
    """The ASGI application. api_key: what clients must send; None: nothing. allowed_hosts: see `Guard`.

    `app.state.bodies` and `app.state.readers` are to be closed when the server ends.
    """
    # Without /docs: that page has browsers load scripts from other hosts
    app = FastAPI(title="lmfusion", version=__version__, docs_url=None, redoc_url=None)
    metrics = Metrics()
    max_bytes, max_waiting = reader.limits.max_body_bytes, worker.max_waiting
    app.state.bodies = bodies = Bodies(max_bytes, BODIES_PER_PLACE * max_waiting, max_bytes * max_waiting)
    app.state.readers = readers = Readers()
    num_reading = 0  # complete, and not submitted yet
    model_card = dict(id=reader.model_name, object="model", created=int(time.time()), owned_by="lmfusion")
    app.add_middleware(Guard, allowed_hosts=allowed_hosts, api_key=api_key, on_status=metrics.count_status)

    def check_place() -> None:
        if worker.stats().num_waiting + num_reading >= max_waiting:
            raise busy(f"{max_waiting} requests are waiting, and no more may; try again in a few seconds")

    @app.post(CHAT_PATH)
    async def chat(http: Request) -> Response:
        nonlocal num_reading
        _check_content(http)
        check_place()
        listener = Listener(metrics)
        body = await bodies.read(http)
        check_place()
        num_reading += 1
        try:
            work = reader.read(body)
            del body  # the reader frees it as soon as it is parsed
            request, prompt, options = await while_connected(http.receive, readers.finish(work))
        finally:
            num_reading -= 1
        try:
            answering = await run_sync(worker.submit, prompt, options, listener)
        except QueueFull as error:
            raise busy(str(error)) from None
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
        if not name:  # /v1/models/
            return await models()
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
        message = f"{http.method} {http.scope['path']}: {error.detail}"
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def on_failure(_: Request, __: Exception) -> Response:
        return ApiError(500, "the server failed at this request; its log tells why").response()

    document(app, has_key=api_key is not None)
    for route in app.routes:
        if isinstance(route, APIRoute) and route.methods == {"GET"}:
            route.methods = {"GET", "HEAD"}  # after the description, in which it would be an operation of its own
    return app


def _check_content(http: Request) -> None:
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # also what keeps web pages of other sites out: browsers ask before they send JSON there
        raise ApiError(415, 'the content type must be "application/json"', code="unsupported_media_type")
    encoding = http.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        message = f"the content encoding is {encoding!r}; send the request without compression"
        raise ApiError(415, message, code="unsupported_media_type")
