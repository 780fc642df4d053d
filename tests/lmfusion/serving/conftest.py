"""Fixtures: a tiny chat model, and a server of it on a free port of the loopback device, in a thread."""

import base64
import contextlib
import io
import json
import logging
import socket
import threading
import time

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from lmfusion.generation.engine import Engine
from lmfusion.generation.worker import EngineWorker
from lmfusion.serving.http.app import build_app
from lmfusion.serving.http.requests import RequestLimits, RequestParser
from lmfusion.serving.lifecycle import EngineServer
from tests.lmfusion.generation.models import build

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
IMAGE_SIZE = 8


def build_chat_model(tiny_llama):
    """A random model: it writes letters, and generates 8 x 8 pixels of noise."""
    model = build(tiny_llama, torch.float32)
    model.tokenizer.chat_template = CHAT_TEMPLATE
    return model


@pytest.fixture(scope="session")
def model(tiny_llama):
    return build_chat_model(tiny_llama)


class Gate:
    """Holds up the engine's steps while it is closed."""

    def __init__(self, engine):
        self._step = engine.step
        self._open = threading.Event()
        self._open.set()
        engine.step = self._wait

    def _wait(self):
        assert self._open.wait(20)
        return self._step()

    def close(self):
        self._open.clear()

    def open(self):
        self._open.set()


class Log(logging.Handler):
    """Collects what a server logs after this was created."""

    NAMES = ("uvicorn.error", "asyncio", "lmfusion")

    def __init__(self):
        super().__init__()
        self.lines = []
        for name in self.NAMES:
            logging.getLogger(name).addHandler(self)

    def emit(self, record):
        self.lines.append(self.format(record))

    def detach(self):
        for name in self.NAMES:
            logging.getLogger(name).removeHandler(self)


class Served:
    """A running server with its engine, worker and client."""

    def __init__(self, model, *, max_waiting=64, max_batch=8, limits=None, defaults=None, **options):
        limits = limits or RequestLimits()
        self.engine = Engine(model, num_slots=4096, max_batch=max_batch, limits=limits.generation)
        self.gate = Gate(self.engine)
        self.worker = EngineWorker(self.engine, max_waiting=max_waiting)
        parser = RequestParser(model, "tiny", limits, defaults)
        self.app = build_app(self.worker, parser, **options)
        self.server = EngineServer(self.app, self.worker, shutdown_seconds=0, port=0)
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()
        wait_until(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=30)

    def stop(self):
        self.gate.open()
        self.client.close()
        self.worker.close()
        self.server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def connect(self, data=b""):
        """A raw connection on which `data` was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.sendall(data)
        return connection

    def wait_until_idle(self):
        """Wait until all clients have disconnected and their requests have ended or were cancelled."""
        self.client.close()
        wait_until(lambda: not self.server.server_state.connections and not self.server.server_state.tasks)
        self.client = httpx.Client(base_url=self.url, timeout=30)

    def post(self, body=None, **fields):
        body = {"messages": [{"role": "user", "content": "hi"}], **fields} if body is None else body
        return self.client.post("/v1/chat/completions", json=body)

    def answer(self, **fields):
        response = self.post(**fields)
        assert response.status_code == 200, response.text
        return response.json()

    def chunks(self, **fields):
        """All chunks of a streamed answer; it must end with [DONE]."""
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, **fields}
        with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
            events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]


@pytest.fixture
def serve(model):
    """Starts servers: serve(**options) -> Served."""
    with contextlib.ExitStack() as stack:

        def start(**options):
            served = Served(model, **options)
            stack.callback(served.stop)
            return served

        yield start


@pytest.fixture
def log():
    """Lines that servers log. Request it after the server, which sets up logging when it starts."""
    handler = Log()
    yield handler.lines
    handler.detach()


@pytest.fixture(scope="module")
def server(model):
    """A server shared by tests that leave nothing behind."""
    served = Served(model)
    yield served
    served.stop()


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def picture(seed=0, size=(IMAGE_SIZE, IMAGE_SIZE)):
    pixels = np.random.default_rng(seed).integers(0, 256, size[::-1], np.uint8)
    return Image.fromarray(pixels)


def data_url(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def image_of(url):
    assert url.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def image_part(url):
    return {"type": "image_url", "image_url": {"url": url}}
