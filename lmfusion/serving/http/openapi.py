"""The OpenAPI description in /openapi.json: requests, responses and errors, with their media types."""

from typing import Any

from fastapi import FastAPI

from lmfusion.serving.errors import TYPES
from lmfusion.serving.http.metrics import CONTENT_TYPE
from lmfusion.serving.http.schema import ChatRequest

COMMON_ERRORS = (400, 401, 500)
"""Errors of all paths: the host is not allowed, the API key is wrong, the server failed."""
PATH_ERRORS = {
    "/v1/chat/completions": (404, 408, 413, 415, 429, 503),
    "/v1/models": (),
    "/v1/models/{name}": (404,),
    "/healthz": (),
    "/metrics": (),
}
ERROR_DESCRIPTIONS = {
    400: "A field is wrong, or the host is not allowed",
    401: "The API key is missing or wrong",
    404: "The model is not the one that is served",
    408: "The request was not complete in time",
    413: "The request is too large",
    415: "The request is not JSON",
    429: "Too many requests are waiting or being received",
    500: "The answer or the server failed",
    503: "The engine has stopped, or all connections are in use",
}


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": {**required, **optional}}


_STRING, _INTEGER = {"type": "string"}, {"type": "integer"}
_STRING_OR_NULL = {"type": ["string", "null"]}
_ERROR_TYPES = sorted({*TYPES.values(), "invalid_request_error"})
_MESSAGE = _object(
    {
        "role": {"const": "assistant"},
        "content": _STRING,
        "parts": {
            "type": "array",
            "items": {"anyOf": [{"$ref": f"#/components/schemas/{part}"} for part in ("TextPart", "ImagePart")]},
        },
    }
)
_CHOICE = _object(
    {
        "index": _INTEGER,
        "message": _MESSAGE,
        "logprobs": {"type": "null"},
        "finish_reason": {"enum": ["stop", "length", "cancelled"]},
    }
)
_USAGE = _object(dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens", "images"), _INTEGER))
_SCHEMAS = {
    "Error": _object(
        {
            "error": _object(
                {"message": _STRING, "type": {"enum": _ERROR_TYPES}, "param": _STRING_OR_NULL, "code": _STRING_OR_NULL}
            )
        }
    ),
    "ChatCompletion": _object(
        {
            "id": _STRING,
            "object": {"const": "chat.completion"},
            "created": _INTEGER,
            "model": _STRING,
            "choices": {"type": "array", "items": _CHOICE},
            "usage": _USAGE,
        }
    ),
    "Model": _object({"id": _STRING, "object": {"const": "model"}, "created": _INTEGER, "owned_by": _STRING}),
    "ModelList": _object(
        {"object": {"const": "list"}, "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}}}
    ),
    "Health": _object({"status": {"enum": ["ready", "unready"]}}, reason=_STRING),
}


def _content(schema: str, media_type: str = "application/json") -> dict[str, Any]:
    return {media_type: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


_RESPONSES: dict[str, dict[int, tuple[str, dict[str, Any]]]] = {
    "/v1/chat/completions": {
        200: (
            "The answer: one object, or with `stream`, server-sent events with `chat.completion.chunk` objects",
            _content("ChatCompletion") | {"text/event-stream": {"schema": _STRING}},
        )
    },
    "/v1/models": {200: ("The model that is served", _content("ModelList"))},
    "/v1/models/{name}": {200: ("The model that is served", _content("Model"))},
    "/healthz": {
        200: ("Requests can be answered", _content("Health")),
        503: ("The engine has stopped", _content("Health")),
    },
    "/metrics": {200: ("Counts and times for Prometheus", {CONTENT_TYPE: {"schema": _STRING}})},
}


def describe_api(app: FastAPI, has_key: bool) -> None:
    """Add the request, the responses and the errors to FastAPI's description of `app`.

    FastAPI does not know them, since the handlers of `app` read requests and write responses themselves. has_key:
    whether clients must send an API key.
    """
    schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    described = app.openapi()
    described["components"] = {"schemas": {**schema.pop("$defs"), "ChatRequest": schema, **_SCHEMAS}}
    for path, methods in described["paths"].items():
        [operation] = methods.values()
        responses = {
            status: (ERROR_DESCRIPTIONS[status], _content("Error")) for status in (*COMMON_ERRORS, *PATH_ERRORS[path])
        }
        responses |= _RESPONSES[path]
        operation["responses"] = {
            str(status): {"description": text, "content": content}
            for status, (text, content) in sorted(responses.items())
        }
    body = {"required": True, "content": _content("ChatRequest")}
    described["paths"]["/v1/chat/completions"]["post"]["requestBody"] = body
    if has_key:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"key": []}]
        described["paths"]["/healthz"]["get"]["security"] = []
