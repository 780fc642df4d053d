"""Tests clients that disconnect at any point or do not send HTTP: nothing is logged and nothing is left behind."""

import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lmfusion.serving import lifecycle
from lmfusion.serving.http import requests as requests_module
from tests.lmfusion.serving.conftest import data_url, image_part, picture, wait_until
from tests.lmfusion.serving.test_connections import GET, HEAD, REQUEST

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).resolve().parents[3]
WHOLE = REQUEST.replace(b'"stream": true', b'"seed":      1')
POINTS = {
    "at once": b"",
    "in the request line": b"POST /v1/ch",
    "in the header": HEAD,
    "before the body": HEAD + b"Content-Length: 1000\r\n\r\n",
    "in the body": HEAD + b"Content-Length: 1000\r\n\r\n{",
    "in a chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n10\r\n{",
    "waiting for 100-continue": HEAD + b"Content-Length: 1000\r\nExpect: 100-continue\r\n\r\n",
    "whole": WHOLE,
    "streamed": REQUEST,
    "sending on": REQUEST + GET,
    "refused": HEAD + b"Content-Length: 100000000\r\n\r\n" + b" " * 1000,
    "wrong": HEAD + b"Content-Length: 1\r\n\r\n{",
    "HEAD": b"HEAD /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "HEAD of a chat": REQUEST.replace(b"POST", b"HEAD"),
    "metrics": GET.replace(b"healthz", b"metrics"),
}
DISCONNECTS = {
    "close": lambda connection: connection.close(),
    "reset": lambda connection: (
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)),
        connection.close(),
    ),
    "half": lambda connection: connection.shutdown(socket.SHUT_WR),
}


@pytest.mark.parametrize("kind", DISCONNECTS)
def test_disconnecting_anywhere_leaves_nothing_and_logs_nothing(serve, request, kind):
    server = serve()
    log = request.getfixturevalue("log")
    connections = []
    for seconds in (0, 0.05):
        for data in POINTS.values():
            connection = server.connect(data)
            time.sleep(seconds)
            DISCONNECTS[kind](connection)
            connections.append(connection)
    wait_until(lambda: not server.server.server_state.connections and not server.server.server_state.tasks)
    wait_until(lambda: server.worker.stats().num_running + server.worker.stats().num_waiting == 0)
    assert server.worker.stats().num_slots_used == 0
    assert server.post(max_tokens=1).status_code == 200
    assert log == []
    assert 'lmfusion_http_responses_total{status="499"}' in server.client.get("/metrics").text
    for connection in connections:
        connection.close()


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS client
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no host
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n bad\r\n\r\n",
        b"GET /%ff%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://[::1/ HTTP/1.1\r\nHost: [::1\r\n\r\n",
        b"GET /v1/models/ HTTP/1.1\r\nHost: [::1\r\n\r\n",
        b"POST /v1/chat/completions/ HTTP/1.1\r\nHost: [::1\r\nContent-Length: 0\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"Content-Length: 100000000\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD.replace(b"json", b"text") + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhelloX",
        REQUEST + b"\x00garbage\r\n\r\n",
        GET + b"\x00garbage\r\n\r\n",
    ],
    ids=range(22),
)
def test_bytes_that_are_not_a_request_get_an_error(serve, request, data):
    server = serve()
    log = request.getfixturevalue("log")
    with server.connect(data) as connection:
        answer = connection.recv(65536)
        connection.settimeout(0.2)
        try:
            while more := connection.recv(65536):
                answer += more
        except (TimeoutError, ConnectionError):
            pass
    status = int(answer.split()[1])
    assert answer.startswith(b"HTTP/1.1 ") and status < 500
    if status >= 400:
        assert b'{"error":{"message":' in answer, answer
    assert server.post(max_tokens=1).status_code == 200
    assert not [line for line in log if "Traceback" in line]
    assert log == []


# --- disconnects and shutdown while a request is parsed ---


class Decodes:
    """A decoder of images that waits for permits."""

    def __init__(self, decode):
        self._decode = decode
        self._permits = threading.Semaphore(0)
        self._begun = []

    def __call__(self, *arguments):
        self._begun.append(1)
        assert self._permits.acquire(timeout=30)
        return self._decode(*arguments)

    def __len__(self):
        return len(self._begun)

    def permit(self, number):
        self._permits.release(number)


@pytest.fixture
def stuck(monkeypatch):
    """Decoding an image waits for a permit. `len` of it is the number of decodes that have begun."""
    decodes = Decodes(requests_module.decode_image)
    monkeypatch.setattr(requests_module, "decode_image", decodes)
    yield decodes
    decodes.permit(1000)


def image_request(num_images=1):
    part = str(image_part(data_url(picture()))).replace("'", '"')
    body = f'{{"messages": [{{"role": "user", "content": [{", ".join([part] * num_images)}]}}]}}'.encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def test_disconnecting_frees_the_place_of_a_request_that_is_parsed(serve, stuck):
    server = serve(max_waiting=6)
    connections = [server.connect(image_request(3)) for _ in range(6)]
    wait_until(lambda: len(stuck) == 4)
    wait_until(lambda: server.post(max_tokens=1).status_code == 429)
    for connection in connections:
        connection.close()
    wait_until(lambda: server.client.get("/metrics").text.count('{status="499"} 6'))
    assert len(stuck) == 4  # nothing more is started for them
    assert server.app.state.parsing_threads._jobs.qsize() == 2


def test_many_images_do_not_keep_others_waiting(serve, stuck):
    """The images of one request are decoded in turn with the steps of other requests."""
    server = serve()
    large = [server.connect(image_request(60)) for _ in range(4)]
    wait_until(lambda: len(stuck) == 4)
    jobs = server.app.state.parsing_threads._jobs
    assert jobs.empty()
    with ThreadPoolExecutor(1) as pool:
        small = pool.submit(server.post, max_tokens=1)
        wait_until(lambda: not jobs.empty())
        stuck.permit(12)  # of 240
        assert small.result(30).status_code == 200
    for connection in large:
        connection.close()


def test_a_server_stops_while_its_parsing_threads_are_busy(serve, stuck, monkeypatch):
    """Without waiting for them: `stop` gives up long before this time is over."""
    monkeypatch.setattr(lifecycle, "CLOSE_SECONDS", 600)
    server = serve()
    connections = [server.connect(image_request()) for _ in range(6)]
    slow = server.connect(HEAD + b"Content-Length: 9\r\n\r\n{")
    wait_until(lambda: len(stuck) == 4)
    server.stop()
    for connection in (*connections, slow):
        assert connection.recv(12) == b"HTTP/1.1 503"
        connection.close()


SCRIPT = """
import contextlib, os, sys, threading, time
from fastapi import FastAPI
from lmfusion.serving import lifecycle
from lmfusion.serving.bodies import BodyReader
from lmfusion.serving.errors import ApiError
from lmfusion.serving.http.parsing_threads import ParsingThreads

class Worker:
    def close(self):
        threading.Event().wait(60 if sys.argv[1] == "engine" else 0)

def work():
    yield
    os.write(1, b"busy\\n")  # in one piece, unlike print
    while True:
        sum(range(10**6)) if sys.argv[1] == "python" else time.sleep(60)

app = FastAPI()
app.state.bodies, app.state.parsing_threads = BodyReader(1, 1, 1), ParsingThreads()

@app.get("/busy")
async def busy():
    with contextlib.suppress(ApiError):
        await app.state.parsing_threads.run(work())

lifecycle.CLOSE_SECONDS = 1 if sys.argv[1] == "engine" else 10
listener = lifecycle.bind("127.0.0.1", 0)
ready = lambda: print(listener.getsockname()[1], flush=True)
lifecycle.run_server(app, Worker(), listener, shutdown_seconds=0.5, on_ready=ready)
"""


@pytest.mark.parametrize(("kind", "code"), [("sleep", 0), ("python", 0), ("engine", 1)])
def test_sigterm_ends_the_process_whatever_its_threads_do(kind, code):
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, kind], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            port = int(process.stdout.readline())
            connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(6)]
            for connection in connections:
                connection.sendall(GET.replace(b"healthz", b"busy"))
            assert [process.stdout.readline() for _ in range(4)] == ["busy\n"] * 4  # all threads
            process.terminate()
            _, errors = process.communicate(timeout=50)
        finally:
            process.kill()
    # 0: it ended by itself; 1: it was ended after `shutdown_seconds + 2 * CLOSE_SECONDS`
    assert process.returncode == code, errors
    assert ("the process exits now" in errors) == (code == 1)
    for connection in connections:
        connection.close()
