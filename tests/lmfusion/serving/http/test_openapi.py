"""Tests that /openapi.json describes every status, media type and body of the server's responses."""

import json

import pytest

from lmfusion.serving.http.openapi import PATH_ERRORS
from lmfusion.serving.http.schema import parse_request
from tests.lmfusion.serving.conftest import Served
from tests.lmfusion.serving.http.json_schema import fits
from tests.lmfusion.serving.http.test_fields import ACCEPTED, OTHERS_ACCEPTED, REFUSED

pytestmark = pytest.mark.timeout(60)

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
HI = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "num_steps": 1}


@pytest.fixture(scope="module")
def server(model):
    served = Served(model, api_key="k")
    served.client.headers["Authorization"] = "Bearer k"
    yield served
    served.stop()


@pytest.fixture(scope="module")
def document(server):
    return server.client.get("/openapi.json").json()


def check(document, path, method, response):
    operation = document["paths"][path][method]
    described = operation["responses"][str(response.status_code)]["content"]
    media_type = response.headers["content-type"]
    names = {name.replace(" ", "").lower(): name for name in described}
    name = names.get(media_type.replace(" ", "").lower()) or names[media_type.partition(";")[0]]
    if name == "application/json":
        assert fits(response.json(), described[name]["schema"], document), response.text
    else:
        assert described[name]["schema"] == {"type": "string"}


CASES = [
    (CHAT, "post", dict(json=HI), 200),
    (CHAT, "post", dict(json=HI | {"min_images": 1, "max_images": 1}), 200),
    (CHAT, "post", dict(json=HI | {"stream": True}), 200),
    (CHAT, "post", dict(json={}), 400),
    (CHAT, "post", dict(content=b"\xff", headers=JSON), 400),
    (CHAT, "post", dict(json=HI, headers={"Host": "evil.example"}), 400),
    (CHAT, "post", dict(json=HI, headers={"Authorization": "Bearer x"}), 401),
    (CHAT, "post", dict(json=HI | {"model": "x"}), 404),
    (CHAT, "post", dict(content=b"x" * (2**24 + 1), headers=JSON), 413),
    (CHAT, "post", dict(content=b"x"), 415),
    (CHAT, "post", dict(content=b"x", headers=JSON | {"Content-Encoding": "gzip"}), 415),
    ("/v1/models", "get", {}, 200),
    ("/v1/models", "get", dict(headers={"Authorization": ""}), 401),
    ("/v1/models/{name}", "get", {}, 404),
    ("/healthz", "get", {}, 200),
    ("/healthz", "get", dict(headers={"Host": "evil.example"}), 400),
    ("/metrics", "get", {}, 200),
    ("/metrics", "get", dict(headers={"Authorization": "Basic k"}), 401),
]


@pytest.mark.parametrize(("path", "method", "arguments", "status"), CASES)
def test_answers_are_as_described(server, document, path, method, arguments, status):
    response = server.client.request(method, path, **arguments)
    assert response.status_code == status
    check(document, path, method, response)


def test_the_model_is_found_by_its_name(server, document):
    check(document, "/v1/models/{name}", "get", server.client.get("/v1/models/tiny"))
    check(document, "/v1/models", "get", server.client.get("/v1/models/"))


def test_failures_are_as_described(serve, document, monkeypatch):
    server = serve(max_waiting=1, max_batch=1)

    def fail():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(server.engine, "step", fail)
    response = server.post()
    assert response.status_code == 500
    check(document, CHAT, "post", response)
    server.worker.close()
    for path, method, arguments in (("/healthz", "get", {}), (CHAT, "post", {"json": HI})):
        response = server.client.request(method, path, **arguments)
        assert response.status_code == 503
        check(document, path, method, response)


def test_every_url_is_described(document):
    assert set(document["paths"]) == set(PATH_ERRORS)
    assert "422" not in json.dumps(document["paths"]) and "HTTPValidationError" not in json.dumps(document)


def test_the_schema_of_requests_is_what_is_accepted(document):
    """As far as JSON Schema can express it: a value that the schema allows may still be beyond a limit."""
    schema = document["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    for table in (ACCEPTED, OTHERS_ACCEPTED):
        for name, values in table.items():
            for value in values:
                body = HI | {name: value}
                parse_request(json.dumps(body).encode())
                assert fits(body, schema, document), (name, value)
    said = {"n", "logprobs", "store", "presence_penalty", "reasoning_effort", "verbosity", "modalities", "seed"}
    for name in said:
        for value in REFUSED[name]:
            assert not fits(HI | {name: value}, schema, document), (name, value)
    assert not fits(HI | {"x": 1}, schema, document) and not fits({}, schema, document)


# --- errors are short, whatever was sent ---

LONG = "x" * 500_000


@pytest.mark.parametrize(
    "fields",
    [
        {LONG: 1},
        {"messages": [{"role": "user", "content": "x", LONG: 1}]},
        {"messages": [{"role": LONG, "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": LONG}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": LONG}]}]},
        {"model": LONG},
        {"sampler": LONG},
        {"tool_choice": LONG},
        {"metadata": LONG},
        {"stop": [LONG]},
        {"stream_options": {LONG: 1}},
        {"response_format": {"type": LONG}},
        {"n": [LONG]},
        {"logit_bias": {LONG: 1}},
        {"negative_prompt": LONG},
    ],
    ids=lambda fields: next(iter(fields))[:20],
)
def test_nothing_is_echoed_whole(server, fields):
    response = server.client.post(CHAT, json=HI | fields)
    assert response.status_code in (400, 404)
    assert len(response.content) < 1500
    assert len(response.json()["error"]["param"]) <= 103


def test_paths_hosts_and_keys_are_not_echoed_whole(server):
    for response in (
        server.client.get("/v1/models/" + "x" * 10_000),
        server.client.get("/" + "x" * 10_000),
        server.client.get("/healthz", headers={"Host": "x" * 10_000}),
        server.client.get("/v1/models", headers={"Authorization": "Bearer " + "x" * 10_000}),
        server.client.post(CHAT, content=b"x", headers=JSON | {"Content-Encoding": "x" * 10_000}),
    ):
        assert 400 <= response.status_code < 500 and len(response.content) < 1500


def test_head_requests(server):
    for path in ("/healthz", "/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json"):
        response = server.client.head(path)
        assert response.status_code == 200 and response.content == b"" and int(response.headers["content-length"]) > 0
    assert server.client.head(CHAT).status_code == 405
