"""Tests the server with many clients: full queues, disconnects, slow readers, failures, access and metrics."""

import json
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from lmfusion.generation.request import Request
from lmfusion.generation.worker import WorkerStats
from lmfusion.serving.http import streaming
from lmfusion.serving.http.metrics import ServerMetrics
from lmfusion.serving.middleware import host_name, is_loopback
from tests.lmfusion.serving.conftest import wait_until

pytestmark = pytest.mark.timeout(60)

LONG = {"max_tokens": 200, "seed": 1, "temperature": 1.0, "max_images": 0}
LONG_IMAGE = {"draw_first": True, "max_images": 1, "num_steps": 1000, "max_tokens": 10, "preview_every": 1}


def open_request(server, path="/v1/chat/completions", **fields):
    """A raw connection on which a request was sent."""
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def read_until(connection, pattern):
    received = b""
    while not re.search(pattern, received):
        data = connection.recv(65536)
        assert data, received
        received += data
    return received


def metrics_of(server):
    lines = server.client.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


# --- a full queue ---


def test_a_full_queue_is_a_429_that_says_when_to_come_back(serve):
    server = serve(max_waiting=2, max_batch=1)
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(server.post, **LONG_IMAGE | {"num_steps": 200})
        wait_until(lambda: server.worker.stats().num_running == 1)
        server.gate.close()
        waiting = [pool.submit(server.post, max_tokens=4) for _ in range(2)]
        wait_until(lambda: server.worker.stats().num_waiting >= 2)
        response = server.post()
        assert response.status_code == 429 and response.headers["retry-after"] == "2"
        assert response.json()["error"] == {
            "message": "2 requests are waiting, which is the limit; try again in a few seconds",
            "type": "rate_limit_error",
            "param": None,
            "code": "queue_full",
        }
        assert metrics_of(server)["lmfusion_requests_rejected_total"] == 1
        server.gate.open()
        assert [future.result().status_code for future in (running, *waiting)] == [200] * 3
    assert server.post(max_tokens=2).status_code == 200


# --- clients that disconnect ---


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fields", [LONG, LONG_IMAGE], ids=["text", "image"])
def test_a_disconnect_cancels_the_request_and_frees_its_slots(serve, stream, fields):
    server = serve()
    connection = open_request(server, stream=stream, **fields)
    if stream:
        read_until(connection, rb'"preview"' if "num_steps" in fields else rb'"content":"[^"]')
    else:
        wait_until(lambda: server.worker.stats().num_running == 1)
    assert server.worker.stats().num_slots_used > 0
    server.gate.close()  # or it might have been finished
    connection.close()
    server.wait_until_idle()
    server.gate.open()
    wait_until(lambda: server.worker.stats().num_finished == {"cancelled": 1})
    stats = server.worker.stats()
    assert (stats.num_running, stats.num_slots_used, stats.num_images) == (0, 0, 0)
    assert server.post(max_tokens=2).status_code == 200


def test_a_disconnect_in_the_queue_leaves_it(serve):
    server = serve(max_batch=1)
    server.gate.close()
    first = open_request(server, **LONG)
    wait_until(lambda: server.worker.stats().num_waiting + server.worker.stats().num_running == 1)
    second = open_request(server, **LONG)
    wait_until(lambda: server.worker.stats().num_waiting + server.worker.stats().num_running == 2)
    second.close()
    wait_until(lambda: len(server.server.server_state.connections) == 1)
    server.gate.open()
    wait_until(lambda: server.worker.stats().num_finished.get("cancelled") == 1)
    assert b"200 OK" in read_until(first, rb'"finish_reason":"(length|stop)"')
    first.close()


def test_a_disconnect_does_not_change_other_answers(serve):
    server = serve()
    alone = server.answer(seed=3, temperature=1.0, max_tokens=60, min_images=1, num_steps=20)["choices"]
    with ThreadPoolExecutor(2) as pool:
        futures = [
            pool.submit(server.answer, seed=3, temperature=1.0, max_tokens=60, min_images=1, num_steps=20)
            for _ in range(2)
        ]
        for _ in range(3):
            connection = open_request(server, stream=True, **LONG_IMAGE)
            read_until(connection, rb'"begin"')
            connection.close()
        assert [future.result()["choices"] for future in futures] == [alone] * 2
    wait_until(lambda: server.worker.stats().num_finished.get("cancelled") == 3)


# --- slow clients ---


def test_an_unsent_preview_is_replaced_by_the_next_one(serve):
    """So the queue of a slow client does not grow with the number of steps."""
    from lmfusion.generation.events import Done, ImageBegin, ImageEnd, ImagePreview, TextDelta

    server = serve()

    async def listen():
        listener = streaming.EventListener(ServerMetrics(no_stats))
        begin, text = ImageBegin(0, 8, 8, 100), TextDelta("a")
        previews = [ImagePreview(0, step, 100, None) for step in range(1, 100)]
        for event in [text, begin, *previews, ImageEnd(0, None), text, Done("stop", 1, 2, 1, 0.1)]:
            listener._put(event)
        return [await listener.next() for _ in range(6)]

    import asyncio

    events = asyncio.run(listen())
    assert [type(event) for event in events] == [TextDelta, ImageBegin, ImagePreview, ImageEnd, TextDelta, Done]
    assert events[2].step == 99
    assert server.worker.stats().num_running == 0


def no_stats():
    return WorkerStats(0, 0, 0, 0)


def test_a_quiet_stream_is_kept_alive(serve, monkeypatch):
    monkeypatch.setattr(streaming, "KEEP_ALIVE_SECONDS", 0.05)
    server = serve()
    server.gate.close()
    connection = open_request(server, stream=True, max_tokens=2)
    assert b": keep-alive\n\n" in read_until(connection, rb": keep-alive\n\n")
    server.gate.open()
    read_until(connection, rb"data: \[DONE\]")
    connection.close()


# --- failures ---


def test_a_failed_answer_is_an_error_whole_or_streamed(serve, monkeypatch):
    server = serve()

    def fail():
        raise RuntimeError("out of memory")

    working = server.engine.step
    monkeypatch.setattr(server.engine, "step", fail)
    response = server.post()
    assert response.status_code == 500
    error = response.json()["error"]
    assert "out of memory" in error["message"] and (error["type"], error["code"]) == (
        "server_error",
        "generation_failed",
    )
    assert server.chunks()[-1] == {"error": error}
    monkeypatch.setattr(server.engine, "step", working)
    assert server.post(max_tokens=2).status_code == 200
    assert server.client.get("/healthz").json() == {"status": "ready"}


@pytest.mark.parametrize("stream", [True, False])
def test_a_failed_answer_does_not_change_others(serve, monkeypatch, stream):
    """The engine ends an answer whose numbers are not finite, and continues with the others."""
    server = serve()
    asked = dict(temperature=1.0, max_tokens=20, min_images=1, max_images=1, num_steps=3)
    alone = server.answer(seed=3, **asked)["choices"]
    start = Request.start

    def fail(request, images):
        if request.options.seed == 666:
            raise FloatingPointError("the image's numbers are not finite")
        start(request, images)

    monkeypatch.setattr(Request, "start", fail)
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(server.answer, seed=3, **asked) for _ in range(2)]
        if stream:
            *_, last = server.chunks(seed=666, **asked)
            error = last["error"]
        else:
            response = server.post(seed=666, **asked)
            assert response.status_code == 500
            error = response.json()["error"]
        assert [future.result()["choices"] for future in others] == [alone] * 2
    assert "not finite" in error["message"]
    assert (error["type"], error["code"]) == ("server_error", "generation_failed")
    assert metrics_of(server)['lmfusion_requests_finished_total{reason="error"}'] == 1


def test_health_reports_a_dead_worker(serve, monkeypatch):
    server = serve()
    assert (server.client.get("/healthz").status_code, metrics_of(server)["lmfusion_engine_up"]) == (200, 1)

    def fail():
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(server.engine, "step", fail)
    for _ in range(3):
        assert server.post().status_code == 500
    wait_until(lambda: server.client.get("/healthz").status_code == 503)
    health = server.client.get("/healthz").json()
    assert health["status"] == "unready" and "illegal memory access" in health["reason"]
    response = server.post()
    assert response.status_code == 503 and response.json()["error"]["code"] == "engine_stopped"
    assert metrics_of(server)["lmfusion_engine_up"] == 0


# --- strangers ---


@pytest.mark.parametrize(
    ("host", "is_allowed"),
    [
        ("127.0.0.1", True),
        ("localhost:8000", True),
        ("LOCALHOST.", True),
        ("[::1]:8000", True),
        ("192.168.1.5:8000", True),
        ("models.example.com", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:80", False),
        ("", False),
    ],
)
def test_host_names_that_were_not_allowed_are_refused(serve, host, is_allowed):
    """DNS rebinding: a page of evil.example lets its own name point to this machine."""
    server = serve(allowed_hosts=["models.example.com"])
    for path in ("/v1/models", "/healthz", "/metrics", "/nowhere"):
        response = server.client.get(path, headers={"Host": host})
        assert (response.status_code != 400) == is_allowed
        if not is_allowed:
            assert response.json()["error"]["code"] == "host_not_allowed"


def test_there_are_no_cors_headers(server):
    response = server.client.get("/v1/models", headers={"Origin": "http://evil.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    response = server.client.options("/v1/chat/completions", headers=preflight)
    assert response.status_code == 405 and not [n for n in response.headers if n.startswith("access-control")]


def test_a_key_is_required_everywhere_except_for_health(serve):
    server = serve(api_key="s3cret")
    for header in (None, "Bearer wrong", "Bearer", "s3cret", "Basic s3cret", "Bearer s3cret2", "Bearer s\xe9cret"):
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
            response = server.client.get(path, headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        response = server.client.post("/v1/chat/completions", content=b"x" * 10, headers=headers)
        assert response.status_code == 401
    assert server.client.get("/healthz").status_code == 200
    assert server.client.get("/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code == 200
    assert server.client.get("/metrics", headers={"Authorization": "bearer s3cret"}).status_code == 200


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("Example.COM:80", "example.com"),
        ("[2001:db8::1]:80", "2001:db8::1"),
        ("a.b.", "a.b"),
        ("", ""),
        ("[::1].evil.com", ""),
        ("127.0.0.1:evil.com", ""),
        ("localhost:80@evil.com", ""),
        ("[127.0.0.1]evil.com", ""),
        ("[::1", ""),
    ],
)
def test_host_names(header, name):
    assert host_name(header) == name


def test_loopback_addresses():
    hosts = {"localhost": True, "127.0.0.1": True, "127.8.8.8": True, "::1": True}
    hosts |= {"0.0.0.0": False, "::": False, "10.0.0.1": False, "example.com": False}
    assert {host: is_loopback(host) for host in hosts} == hosts


# --- models, health and metrics ---


def test_models_health_and_description(server):
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == ["tiny"]
    assert server.client.get("/v1/models/tiny").json() == listed["data"][0]
    document = server.client.get("/openapi.json").json()
    request = document["components"]["schemas"]["ChatRequest"]
    assert {"messages", "max_images", "num_steps"} <= set(request["properties"])
    references = set(re.findall(r'"\$ref": ?"#/components/schemas/(\w+)"', json.dumps(document)))
    assert {"ChatRequest", "ChatMessage"} <= references <= set(document["components"]["schemas"])


def test_metrics_count_what_happened(serve):
    server = serve()
    server.answer(max_tokens=5, temperature=1.0, max_images=0)
    server.chunks(max_tokens=3, min_images=2, num_steps=4, draw_first=True, preview_every=1)
    server.post(temperature=-1)
    values = metrics_of(server)
    expected = {
        "lmfusion_engine_up": 1,
        "lmfusion_requests_waiting": 0,
        "lmfusion_requests_running": 0,
        'lmfusion_requests_finished_total{reason="error"}': 0,
        "lmfusion_requests_rejected_total": 0,
        'lmfusion_http_responses_total{status="200"}': 2,
        'lmfusion_http_responses_total{status="400"}': 1,
        "lmfusion_images_total": 2,
        "lmfusion_denoise_steps_total": 8,
        "lmfusion_cache_slots": 4096,
        "lmfusion_cache_slots_used": 0,
        "lmfusion_first_event_seconds_count": 2,
        "lmfusion_request_seconds_count": 2,
        'lmfusion_request_seconds_bucket{le="+Inf"}': 2,
    }
    assert {name: values[name] for name in expected} == expected
    finished = sum(value for name, value in values.items() if name.startswith("lmfusion_requests_finished_total"))
    assert finished == 2 and values["lmfusion_new_tokens_total"] == 8
    assert 0 < values["lmfusion_first_event_seconds_sum"] <= values["lmfusion_request_seconds_sum"]
    content_type = server.client.get("/metrics").headers["content-type"]
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"


def test_the_cache_and_the_running_are_seen_while_they_run(serve):
    server = serve()
    with httpx.stream(
        "POST",
        f"{server.url}/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "hi"}], "stream": True, **LONG_IMAGE},
    ) as response:
        lines = response.iter_lines()
        next(lines)
        server.gate.close()
        values = metrics_of(server)
        assert values["lmfusion_requests_running"] + values["lmfusion_requests_waiting"] == 1
        server.gate.open()
        wait_until(lambda: metrics_of(server)["lmfusion_cache_slots_used"] > 0)
    wait_until(lambda: metrics_of(server)["lmfusion_cache_slots_used"] == 0)


def test_two_servers_in_a_process_count_apart():
    one, other = ServerMetrics(no_stats), ServerMetrics(no_stats)
    one.count_status(429)
    for seconds in (0.5, 1.0, 7.0):
        one.latency.observe(seconds)
    lines = one.render().decode().splitlines()
    assert 'lmfusion_request_seconds_bucket{le="1.0"} 2.0' in lines and "lmfusion_request_seconds_sum 8.5" in lines
    assert "lmfusion_requests_rejected_total 1.0" in lines
    lines = other.render().decode().splitlines()
    assert "lmfusion_request_seconds_count 0.0" in lines and "lmfusion_requests_rejected_total 0.0" in lines


def test_many_clients_at_once_while_one_sends_rubbish(serve):
    server = serve(max_batch=4)
    stop = threading.Event()

    def rubbish():
        while not stop.is_set():
            assert server.post(temperature="x").status_code == 400

    with ThreadPoolExecutor(12) as pool:
        spoiler = pool.submit(rubbish)
        try:
            answers = list(pool.map(lambda i: server.answer(seed=i, temperature=1.0, max_tokens=20), range(10)))
        finally:
            stop.set()
        spoiler.result()
    for i in (0, 9):
        assert server.answer(seed=i, temperature=1.0, max_tokens=20)["choices"] == answers[i]["choices"]
