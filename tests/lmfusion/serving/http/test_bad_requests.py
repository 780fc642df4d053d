"""Tests that bad requests get OpenAI's error body with the field at fault, and do not affect others."""

import base64
import http.client
import io
import json
import socket

import httpx
import numpy as np
import pytest
from PIL import Image

from lmfusion.generation.options import Limits
from lmfusion.serving.errors import ApiError
from lmfusion.serving.http.requests import RequestLimits, RequestParser
from tests.lmfusion.serving.conftest import Served, data_url, image_part, picture

pytestmark = pytest.mark.timeout(60)

LIMITS = RequestLimits(
    max_body_bytes=200_000,
    max_text_chars=2000,
    max_image_pixels=10_000,
    generation=Limits(max_new_tokens=50, max_images=2, max_num_steps=20, max_image_size=16, max_prompt_images=2),
)


@pytest.fixture(scope="module")
def server(model):
    served = Served(model, limits=LIMITS)
    yield served
    served.stop()


def user(*content):
    return {"messages": [{"role": "user", "content": list(content)}]}


def check(response, status, message, param=None, code=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(response.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert message in error["message"], error["message"]
    assert error["param"] == param
    if code is not None:
        assert error["code"] == code


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"temprature": 1}, "unknown field 'temprature'", "temprature"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "'messages[0].mood'", "messages[0].mood"),
        ({"stream_options": {"usage": True}}, "unknown field 'stream_options.usage'", "stream_options.usage"),
        ({"messages": []}, "messages: List should have at least 1 item", "messages"),
        ({"messages": "hi"}, "messages: Input should be a valid", "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role is missing", "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: Input should be", "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "messages[0].content"),
        (user({"type": "audio"}), 'a part must be {"type": "text", "text": ...} or', "messages[0].content[0]"),
        (user({"type": "text"}), "messages[0].content[0].text is missing", "messages[0].content[0].text"),
        ({"temperature": "hot"}, "temperature: Input should be a valid number", "temperature"),
        ({"temperature": -1}, "temperature must be 0 or between 0.001 and 1000, got -1", "temperature"),
        ({"top_p": 0}, "top_p must be between 1e-06 and 1, got 0", "top_p"),
        ({"max_tokens": 51}, "max_tokens must be at most 50 here, got 51", "max_tokens"),
        ({"max_completion_tokens": 51}, "max_tokens must be at most 50 here, got 51", "max_tokens"),
        (
            {"max_tokens": 4, "max_completion_tokens": 5},
            "must be equal, got 4 and 5",
            "max_completion_tokens",
        ),
        ({"max_tokens": True}, "max_tokens: Input should be a valid integer", "max_tokens"),
        ({"max_tokens": 0, "max_images": 0}, "nothing to generate", "max_tokens"),
        ({"stop": ["x"] * 17}, "stop must be at most 16 texts", "stop"),
        ({"stop": [""]}, "none empty", "stop"),
        ({"stop": "x" * 2000}, "at most 1000 characters", "stop"),
        ({"seed": -(2**63) - 1}, "seed: Input should be greater than or equal to -9223372036854775808", "seed"),
        ({"seed": 2**63}, "seed: Input should be less than", "seed"),
        ({"n": 2}, "n must be 1, got 2; leave the field out", "n"),
        ({"logprobs": True}, "logprobs must be false, got true", "logprobs"),
        ({"tools": [{"type": "function"}]}, 'tools must be empty unless tool_choice is "none"', "tools"),
        ({"presence_penalty": 0.5}, "presence_penalty must be 0, got 0.5", "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "response_format.type"),
        ({"stream": "yes"}, "stream: Input should be a valid boolean", "stream"),
        ({"max_images": 3}, "max_images must be at most 2 here, got 3", "max_images"),
        ({"min_images": 2, "max_images": 1}, "min_images must be at most max_images (1), got 2", "min_images"),
        ({"num_steps": 21}, "num_steps must be at most 20 here, got 21", "num_steps"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0", "num_steps"),
        ({"sampler": "euler"}, "sampler must be one of ddpm", "sampler"),
        ({"guidance_scale": -2}, "guidance_scale must be between 0 and 1,000, got -2", "guidance_scale"),
        ({"guidance_interval": [0.9, 0.1]}, "<= 1, got (0.9, 0.1)", "guidance_interval"),
        ({"guidance_interval": [0.9]}, "guidance_interval[1] is missing", "guidance_interval[1]"),
        ({"guidance_rescale": 2}, "guidance_rescale must be between 0 and 1, got 2", "guidance_rescale"),
        ({"image_size": 17}, "image_size must be at most 16 here, got 17", "image_size"),
        ({"image_size": 0, "min_images": 1}, "image_size must be at least 1, got 0", "image_size"),
        ({"preview_every": -1}, "preview_every must be at least 0, got -1", "preview_every"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, "characters, got 3000", "messages"),
        ({"messages": [{"role": "user", "content": "x" * 1000}]}, "the model's context of 256", None),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_wrong_field_is_named(server, fields, message, param):
    check(server.post(**fields), 400, message, param)


@pytest.mark.parametrize("char", ["x", "\ue000", "\U0001f600", " "])
@pytest.mark.parametrize("field", ["content", "parts", "negative_prompt"])
def test_texts_that_are_far_too_long_are_refused_before_they_are_tokenized(model, monkeypatch, char, field):
    """The limit is 16 characters per token of the context."""
    monkeypatch.setattr(
        "lmfusion.serving.http.requests.encode_prompt", lambda *_: (_ for _ in ()).throw(AssertionError)
    )
    parser = RequestParser(model, "tiny")
    text = char * (16 * 256 + 1)
    if field == "negative_prompt":
        body = {"messages": [{"role": "user", "content": "x"}], "negative_prompt": text}
    elif field == "content":
        body = {"messages": [{"role": "user", "content": text}]}
    else:
        body = user({"type": "text", "text": text[:2000]}, {"type": "text", "text": text[2000:]})
    with pytest.raises(ApiError, match=r"the messages must have at most 4096 characters, got 409[78]") as caught:
        list(parser.parse(json.dumps(body).encode()))
    assert caught.value.code == "context_length_exceeded"


def test_a_slow_image_is_an_error_of_the_client(server, monkeypatch):
    """The decoder's error, such as too many scans, becomes an error of the image."""

    def refuse(data, name):
        raise ValueError(f"{name} has 200 scans; the limit is 100, save it again")

    monkeypatch.setattr("lmfusion.serving.http.requests.decode_image", refuse)
    response = server.post(user(image_part(data_url(picture()))))
    check(response, 400, "has 200 scans; the limit is 100", "messages[0].content[0]", "invalid_image")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body must be JSON"),
        (b"{", "the body must be JSON"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "the body must be JSON"),
        (b"[]", "the body: Input should be an object"),
        (b"[" * 100_000, "the body must be JSON"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "the body must be JSON"),
        (b'{"temperature": NaN, "messages": [{"role": "user", "content": "x"}]}', "temperature"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "the body must be JSON"),
    ],
    ids=lambda value: repr(value)[:30] if isinstance(value, bytes) else "",
)
def test_bodies_that_are_not_requests(server, body, message):
    response = server.client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and message in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/a.png",
        "https://example.com/a.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "data:image/svg+xml;base64,AAAA",
        "data:text/html;base64,AAAA",
        "data:image/png,AAAA",
        "",
    ],
)
def test_nothing_is_fetched(server, url, monkeypatch):
    def connect(*_):
        raise AssertionError("something was opened")

    with httpx.Client(base_url=server.url, timeout=30) as client:
        client.get("/healthz")  # connected from now on
        monkeypatch.setattr(socket.socket, "connect", connect)
        monkeypatch.setattr(socket, "getaddrinfo", connect)
        monkeypatch.setattr("builtins.open", connect)
        response = client.post("/v1/chat/completions", json=user(image_part(url)))
        monkeypatch.undo()
    where = "messages[0].content[0]"
    check(response, 400, "addresses are not fetched, send the image itself", where, "invalid_image_url")


def png_of(width, height):
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message", "code"),
    [
        (b"hello", "is not an image of a known format", "invalid_image"),
        (b"", "is not an image of a known format", "invalid_image"),
        (png_of(8, 8)[:-20], "is damaged or truncated", "invalid_image"),
        (b"GIF89a" + bytes(20), "is not an image of a known format", "invalid_image"),
        (png_of(101, 100), "must have at most 10000 pixels, got 101 x 100", "image_too_large"),
        (png_of(5_000, 5_000), "pixels", "image_too_large"),
    ],
)
def test_images_that_cannot_be_used(server, data, message, code):
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    response = server.post(user({"type": "text", "text": "x"}, image_part(url)))
    check(response, 400, message, "messages[0].content[1]", code)


def test_wrong_base64_is_named(server):
    response = server.post(user(image_part("data:image/png;base64,A*A")))
    check(response, 400, "must be valid base64", "messages[0].content[0]", "invalid_image")


def test_too_many_images(server):
    response = server.post(user(*[image_part(data_url(picture()))] * 3))
    check(response, 400, "the number of images in the prompt must be at most 2 here, got 3")


def test_another_model_and_unknown_paths(server):
    check(server.post(model="gpt-4o"), 404, "model must be 'tiny', got 'gpt-4o'", "model", "model_not_found")
    check(server.client.get("/v1/models/gpt-4o"), 404, "model must be 'tiny'", "model", "model_not_found")
    check(server.client.get("/v1/embeddings"), 404, "GET /v1/embeddings: Not Found")
    check(server.client.get("/v1/chat/completions"), 405, "Method Not Allowed")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_web_pages_of_other_sites_cannot_post(server, kind):
    """A browser sends these content types to other sites without asking them first."""
    body = b'{"messages": [{"role": "user", "content": "hi"}]}'
    response = server.client.post("/v1/chat/completions", content=body, headers={"Content-Type": kind})
    check(response, 415, 'the content type must be "application/json"', code="unsupported_media_type")


def test_a_large_body_is_refused_by_its_announcement(server):
    """Before any of it is sent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 200001\r\n\r\n".encode())
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 413 and b"must have at most 200000 bytes" in response.read()


def test_a_large_body_is_refused_while_it_is_read(server):
    """A body without a length is refused long before its end."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(21):
            connection.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 413 and b"must have at most 200000 bytes" in response.read()


@pytest.mark.parametrize("announced", [True, False])
def test_a_client_that_sends_on_gets_the_refusal_and_may_go_on(server, announced):
    body = [b" " * 100_000] * 100
    headers = {"Content-Type": "application/json"}
    response = server.client.post(
        "/v1/chat/completions", content=b"".join(body) if announced else iter(body), headers=headers
    )
    check(response, 413, "must have at most 200000 bytes", code="request_too_large")
    assert server.client.get("/healthz").status_code == 200


def test_long_values_are_not_echoed_whole(server):
    response = server.post(sampler="x" * 100_000)
    assert response.status_code == 400 and len(response.text) < 1000


def test_control_tokens_in_a_message_are_text(server):
    """So they cannot end the user's turn."""
    plain, spelled = (
        server.answer(max_tokens=1),
        server.answer(messages=[{"role": "user", "content": "hi</s>"}], max_tokens=1),
    )
    assert spelled["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"] + len("</s>")


def test_after_all_that_the_server_answers_as_before(server):
    before = server.answer(seed=5, temperature=1.0)["choices"]
    for fields in ({"temperature": -1}, {"x": 1}, user(image_part("data:image/png;base64,AAAA"))):
        assert server.post(**fields).status_code == 400
    assert server.answer(seed=5, temperature=1.0)["choices"] == before
    assert server.worker.stats().num_running == 0


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"steps": 3}, r"the field must be one of chat_template_kwargs, draw_first.*; got 'steps'"),
        ({"stream": True}, "got 'stream'"),
        ({"num_steps": 30}, "num_steps must be at most 20 here, got 30"),
        ({"temperature": "hot"}, "temperature: Input should be a valid number"),
        ({"sampler": "euler"}, "sampler must be one of ddpm"),
    ],
)
def test_defaults_that_no_request_could_have(model, defaults, message):
    with pytest.raises(ValueError, match=message):
        RequestParser(model, "tiny", LIMITS, defaults)


@pytest.mark.parametrize("name", ["max_body_bytes", "max_text_chars", "max_image_pixels"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        RequestLimits(**{name: 0})


def test_pictures_are_what_these_tests_think(server):
    """The image from which the refused ones are made is accepted."""
    assert server.post(user(image_part(data_url(picture())))).status_code == 200
    assert np.asarray(picture()).shape == (8, 8)
