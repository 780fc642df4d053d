"""The HTTP application: OpenAI's chat API, the model's name, health, metrics and the API's description.

Request bodies are parsed in threads of their own, so decoding one client's images does not hold up others' streams.
"""

import time
import uuid
from collections.abc import Collection

from anyio.to_thread import run_sync
from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from lmfusion import __version__
from lmfusion.generation.worker import EngineWorker, QueueFull, Stopped
from lmfusion.serving.bodies import BodyReader
from lmfusion.serving.errors import ApiError, queue_full
from lmfusion.serving.http.disconnects import while_connected
from lmfusion.serving.http.metrics import CONTENT_TYPE, ServerMetrics
from lmfusion.serving.http.openapi import describe_api
from lmfusion.serving.http.parsing_threads import ParsingThreads
from lmfusion.serving.http.requests import RequestParser, options_error
from lmfusion.serving.http.streaming import CompletionResponse, EventListener, StreamedCompletionResponse
from lmfusion.serving.middleware import HostAndKeyMiddleware

CHAT_PATH = "/v1/chat/completions"
BODIES_PER_QUEUE_PLACE = 4
"""Bodies received at the same time per place in the queue. A body takes a place once it is complete."""


def build_app(
    worker: EngineWorker,
    parser: RequestParser,
    *,
    api_key: str | None = None,
    allowed_hosts: Collection[str] = (),
) -> FastAPI:
    """Build the ASGI application. Close `app.state.bodies` and `app.state.parsing_threads` when the server ends.

    Args:
        worker: runs the engine that answers.
        parser: turns request bodies into prompts and options.
        api_key: the key that clients must send; None: no key is needed.
        allowed_hosts: names by which the server may be called, besides localhost and IP addresses.
    """
    # Without /docs: that page has browsers load scripts from other hosts.
    app = FastAPI(title="lmfusion", version=__version__, docs_url=None, redoc_url=None)
    metrics = ServerMetrics(worker.stats)
    max_bytes, max_waiting = parser.limits.max_body_bytes, worker.max_waiting
    app.state.bodies = bodies = BodyReader(max_bytes, BODIES_PER_QUEUE_PLACE * max_waiting, max_bytes * max_waiting)
    app.state.parsing_threads = parsing_threads = ParsingThreads()
    num_parsing = 0  # requests that are complete and not submitted yet
    model_card = dict(id=parser.model_name, object="model", created=int(time.time()), owned_by="lmfusion")
    app.add_middleware(
        HostAndKeyMiddleware, allowed_hosts=allowed_hosts, api_key=api_key, on_status=metrics.count_status
    )

    def check_queue() -> None:
        if worker.stats().num_waiting + num_parsing >= max_waiting:
            raise queue_full(f"{max_waiting} requests are waiting, which is the limit; try again in a few seconds")

    @app.post(CHAT_PATH)
    async def chat(http: Request) -> Response:
        nonlocal num_parsing
        _check_content(http)
        check_queue()
        listener = EventListener(metrics)
        body = await bodies.read(http.scope, http.receive)
        check_queue()
        num_parsing += 1
        try:
            work = parser.parse(body)
            del body  # the parser frees it as soon as it has read the JSON
            request, prompt, options = await while_connected(http.receive, parsing_threads.run(work))
        finally:
            num_parsing -= 1
        try:
            stream = await run_sync(worker.submit, prompt, options, listener)
        except QueueFull as error:
            raise queue_full(str(error)) from None
        except Stopped as error:
            raise ApiError(503, str(error), code="engine_stopped") from None
        except ValueError as error:
            raise options_error(error) from None
        answer = (f"chatcmpl-{uuid.uuid4().hex}", parser.model_name, stream, listener)
        if not request.stream:
            return CompletionResponse(*answer)
        with_usage = request.stream_options is not None and bool(request.stream_options.include_usage)
        return StreamedCompletionResponse(*answer, with_usage=with_usage)

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [model_card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, object]:
        if not name:  # /v1/models/
            return await models()
        parser.check_model(name)
        return model_card

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        problem = worker.stats().problem
        if problem:
            return JSONResponse({"status": "unready", "reason": problem}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def on_http_error(http: Request, error: HTTPException) -> Response:
        message = f"{http.method} {http.scope['path']}: {error.detail}"
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def on_failure(_: Request, __: Exception) -> Response:
        return ApiError(500, "the server failed to handle this request; see its log for the reason").response()

    describe_api(app, has_key=api_key is not None)
    # Only now, because the description would list HEAD as an operation of its own.
    for route in app.routes:
        if isinstance(route, APIRoute) and route.methods == {"GET"}:
            route.methods = {"GET", "HEAD"}
    return app


def _check_content(http: Request) -> None:
    given = http.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        # This also keeps out web pages of other sites: browsers ask before they send JSON to another site.
        message = f'the content type must be "application/json", got {given!r}'
        raise ApiError(415, message, code="unsupported_media_type")
    encoding = http.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        message = f'the content encoding must be "identity", got {encoding!r}; send the request without compression'
        raise ApiError(415, message, code="unsupported_media_type")
