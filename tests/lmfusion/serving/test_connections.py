"""Tests the limits of connections: silent, slow and endless ones, and more than the limit."""

import contextlib
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmfusion.serving import bodies, connections, lifecycle
from lmfusion.serving.connections import Connections, raise_file_limit
from lmfusion.serving.http import streaming
from lmfusion.serving.http.requests import RequestLimits
from tests.lmfusion.serving.conftest import Served, wait_until

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).resolve().parents[3]
DEADLINE = 20.0
"""Seconds for what takes less than one on an idle machine."""
GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = b'{"messages": [{"role": "user", "content": "hi"}], "stream": true, "max_tokens": 200, "temperature": 1}'
REQUEST = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


def wait_until_closed(connection, drip=b"", every=0.05):
    """Send `drip` again and again until the server closes the connection."""
    end = time.monotonic() + DEADLINE
    connection.settimeout(every)
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                if not connection.recv(65536):
                    return
            if drip:
                connection.sendall(drip)
        pytest.fail(f"the connection was still open after {DEADLINE} seconds")


# --- clients that send nothing, or slowly ---


@pytest.mark.parametrize(
    ("first", "drip", "seconds"),
    [
        (b"", b"", 0.6),
        (b"", b"\r\n", 0),
        (b"G", b"", 0.3),
        (b"GET /healthz HTTP/1.1\r\n", b"X: y\r\n", 0.3),
        (b"GET /", b"a", 0.3),
        (GET, b"", 0.6),
        (GET, b"\r\n", 0),
        (GET + b"G", b"", 0.3),
        (GET + GET + b"GET / HTTP/1.1\r\n", b"X: y\r\n", 0.3),
    ],
    ids=["silent", "newlines", "a byte", "headers", "path", "idle", "idle newlines", "next", "pipelined"],
)
def test_a_connection_without_a_whole_header_is_closed(serve, monkeypatch, first, drip, seconds):
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.6)
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    server = serve()
    start = time.monotonic()  # before the server's timer can start
    with server.connect(first) as connection:
        wait_until_closed(connection, drip)
    assert time.monotonic() - start >= seconds


@pytest.mark.parametrize("drip", [b"", b" "])
def test_a_body_that_does_not_come_is_given_up(serve, monkeypatch, drip):
    monkeypatch.setattr(bodies, "GRACE_SECONDS", 0.3)
    server = serve()
    with server.connect(HEAD + b"Content-Length: 1000\r\n\r\n{") as connection:
        start = time.monotonic()
        connection.settimeout(0.05)
        answer = b""
        while b"came too slowly" not in answer and time.monotonic() - start < DEADLINE:
            with contextlib.suppress(TimeoutError):
                answer += connection.recv(65536)
            with contextlib.suppress(ConnectionError):
                connection.sendall(drip)
    assert b" 408 " in answer and b"connection: close" in answer.lower()


def test_a_body_that_comes_fast_enough_has_a_minute(serve, monkeypatch):
    """Ten bytes every 0.1 seconds are ten times the minimum rate here, so the test tolerates pauses of a second."""
    monkeypatch.setattr(bodies, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(bodies, "MIN_BYTES_PER_SECOND", 10)
    server = serve()
    with server.connect(HEAD + b"Content-Length: %d\r\n\r\n" % (len(BODY) + 100)) as connection:
        for _ in range(10):
            connection.sendall(b" " * 10)
            time.sleep(0.1)
        connection.sendall(BODY)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_the_time_of_a_body_is_limited_at_any_rate(serve, monkeypatch):
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.3)
    server = serve()
    with server.connect(HEAD + b"Transfer-Encoding: chunked\r\n\r\n") as connection:
        wait_until_closed(connection, b"1000\r\n" + b" " * 0x1000 + b"\r\n", 0.02)


# --- clients that send too much ---

REFUSED = {
    "400": b"POST /v1/chat/completions HTTP/1.1\r\nHost: evil.example\r\n",
    "401": b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\n",
    "404": b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer k\r\n",
    "405": b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer k\r\n",
    "200": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer k\r\n",
    "413": HEAD + b"Authorization: Bearer k\r\n",
    "415": b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer k\r\n",
}


@pytest.mark.parametrize("kind", ["fast", "slow"])
@pytest.mark.parametrize("status", REFUSED)
def test_an_unread_body_is_cut_off(serve, monkeypatch, status, kind):
    monkeypatch.setattr(connections, "MAX_DISCARDED_BYTES", 500_000 if kind == "fast" else 2**40)
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.5 if kind == "slow" else 30)
    server = serve(api_key="k", limits=RequestLimits(max_body_bytes=10_000))
    size = 50_000 if kind == "fast" else 100
    chunk = b"%x\r\n" % size + b" " * size + b"\r\n"
    with server.connect(REFUSED[status] + b"Transfer-Encoding: chunked\r\n\r\n") as connection:
        if status == "413":
            connection.sendall(b"2711\r\n" + b" " * 0x2711 + b"\r\n")
        assert connection.recv(12) == f"HTTP/1.1 {status}".encode()
        wait_until_closed(connection, chunk, 0.01)


def test_a_full_queue_does_not_read_an_endless_body(serve, monkeypatch):
    monkeypatch.setattr(connections, "MAX_DISCARDED_BYTES", 500_000)
    server = serve(max_waiting=1, max_batch=1)
    server.gate.close()
    waiting = [server.connect(REQUEST)]
    wait_until(lambda: server.worker.stats().num_waiting + server.worker.stats().num_running >= 1)
    with server.connect(HEAD + b"Transfer-Encoding: chunked\r\n\r\n") as connection:
        assert connection.recv(12) == b"HTTP/1.1 429"
        wait_until_closed(connection, b"10000\r\n" + b" " * 0x10000 + b"\r\n", 0.01)
    waiting[0].close()
    server.gate.open()


def test_what_is_sent_ahead_of_an_answer_does_not_hide_the_end(serve):
    """uvicorn stops reading when anything follows a request, and would not notice that the client has disconnected."""
    server = serve()
    server.gate.close()
    connection = server.connect(REQUEST + GET[:20])
    wait_until(lambda: server.worker.stats().num_waiting + server.worker.stats().num_running == 1)
    connection.close()
    server.wait_until_idle()
    server.gate.open()
    wait_until(lambda: server.worker.stats().num_finished == {"cancelled": 1})


# --- clients that read nothing ---


def test_a_client_that_reads_nothing_is_disconnected(serve, monkeypatch):
    monkeypatch.setattr(connections, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(streaming, "data_url", lambda image: "x" * 3_000_000)  # more than sockets hold
    server = serve()
    body = BODY.replace(b'"max_tokens": 200', b'"draw_first": true, "num_steps": 1000, "preview_every": 1')
    connection = server.connect(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    wait_until(lambda: server.worker.stats().num_finished == {"cancelled": 1})
    wait_until(lambda: len(server.server.server_state.connections) == 0)
    connection.close()


def test_a_slow_reader_gets_the_whole_answer(serve, monkeypatch):
    """The server has written the whole answer long before the client has read it."""
    monkeypatch.setattr(connections, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(connections, "IDLE_SECONDS", 1.0)
    monkeypatch.setattr(streaming, "data_url", lambda image: "x" * 30_000_000)
    server = serve()
    body = BODY.replace(b'"stream": true', b'"draw_first": true, "num_steps": 1, "max_images": 1')
    received = 0
    with server.connect(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body) as connection:
        while received < 30_000_000:
            data = connection.recv(1_000_000)
            assert data, received
            received += len(data)
            time.sleep(0.06)


# --- more connections than the limit ---


def test_idle_connections_make_room_for_new_ones(serve, log):
    server = serve()
    server.server._connections.max_connections = 5
    with contextlib.ExitStack() as stack:
        for first in (b"", b"GET / HT", HEAD + b"Content-Length: 9\r\n\r\n{", GET) * 5:
            stack.enter_context(server.connect(first))
        answer = stack.enter_context(server.connect(GET))
        assert answer.recv(12) == b"HTTP/1.1 200"
        assert server.post(max_tokens=1).status_code == 200
        assert len(server.server.server_state.connections) <= 6
    assert len([line for line in log if "connections are open, the limit" in line]) == 1
    assert not [line for line in log if "Traceback" in line]


def test_running_answers_are_not_dropped_for_new_connections(serve):
    server = serve()
    server.gate.close()
    server.server._connections.max_connections = 2
    running = [server.connect(REQUEST) for _ in range(2)]
    wait_until(lambda: server.worker.stats().num_waiting + server.worker.stats().num_running == 2)
    with server.connect() as connection:
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n") and b"too_many_connections" in answer
        assert connection.recv(100) == b""
    server.gate.open()
    for connection in running:
        with connection:
            assert connection.recv(12) == b"HTTP/1.1 200"


def test_incomplete_bodies_take_no_place_in_the_queue(serve):
    server = serve(max_waiting=2)
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(server.connect(HEAD + b"Content-Length: 1000\r\n\r\n{")) for _ in range(30)]
        for _ in range(3):
            assert server.post(max_tokens=1).status_code == 200
        # With more than four per place, the oldest are dropped.
        assert slow[0].recv(12) == b"HTTP/1.1 429" and b"has taken the longest" in slow[0].recv(65536)
        slow[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            slow[-1].recv(1)


def test_incomplete_bodies_hold_no_more_memory_than_the_queue(serve):
    server = serve(max_waiting=2, limits=RequestLimits(max_body_bytes=100_000))
    head = HEAD + b"Content-Length: 100000\r\n\r\n"
    with contextlib.ExitStack() as stack:
        large = [stack.enter_context(server.connect(head + b" " * 90_000)) for _ in range(3)]
        assert large[0].recv(12) == b"HTTP/1.1 429"
        assert server.post(max_tokens=1).status_code == 200
        assert server.app.state.bodies._num_bytes == 180_000
    wait_until(lambda: server.app.state.bodies._num_bytes == 0)


SCRIPT = """
import resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from fastapi import FastAPI
from lmfusion.serving.bodies import BodyReader
from lmfusion.serving.http.parsing_threads import ParsingThreads
from lmfusion.serving.lifecycle import bind, run_server, url_of

class Worker:
    def close(self):
        pass

app = FastAPI()
app.state.bodies, app.state.parsing_threads = BodyReader(1, 1, 1), ParsingThreads()
app.get("/healthz")(lambda: "well")
listener = bind("127.0.0.1", 0)
ready = lambda: print(listener.getsockname()[1], flush=True)
run_server(app, Worker(), listener, shutdown_seconds=0, on_ready=ready)
"""


def test_with_few_files_silent_connections_lock_nobody_out(tmp_path):
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
        stack.callback(process.kill)
        port = int(process.stdout.readline())
        for _ in range(300):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as connection:
                connection.sendall(GET)
                assert connection.recv(12) == b"HTTP/1.1 200"
        process.terminate()
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    [line] = [line for line in errors.splitlines() if "lmfusion" in line or "accept" in line]
    assert "connections are open, the limit" in line


def test_a_lack_of_files_is_logged_once(log):
    shared = Connections()
    for _ in range(1000):
        message = "socket.accept() out of system resource"
        shared.on_loop_error(None, {"message": message, "exception": OSError(24, "Too many open files")})
    assert len(log) == 1 and "Too many open files" in log[0]


def test_the_limit_of_open_files_is_raised(monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 64, before[1]))
        num_connections, backlog = raise_file_limit()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert hard == before[1] and soft >= num_open + num_connections + backlog
        assert num_connections == connections.MAX_CONNECTIONS or soft == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("soft", [64, 256, 1024, 4096, 10**6])
def test_connections_leave_files_for_everything_else(monkeypatch, soft):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, soft))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: None)
    monkeypatch.setattr(os, "listdir", lambda path: ["x"] * 20)
    num_connections, backlog = raise_file_limit()
    assert 1 <= num_connections <= connections.MAX_CONNECTIONS and 1 <= backlog <= connections.MAX_BACKLOG
    assert num_connections + backlog + 20 <= soft
    assert num_connections == connections.MAX_CONNECTIONS or soft < 4096


def test_a_server_stops_with_open_connections(model, monkeypatch):
    """Without waiting for them: `stop` gives up long before this time is over."""
    monkeypatch.setattr(lifecycle, "CLOSE_SECONDS", 600)
    served = Served(model)
    for first in (b"", b"GET", HEAD + b"Content-Length: 9\r\n\r\n{", GET):
        served.connect(first)
    served.stop()
