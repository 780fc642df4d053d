"""A tiny model that chats, its page on a free port of the loopback device, and a browser to look at it."""

import threading
import time

import pytest
import torch

from lmfusion.generation.engine import Engine
from lmfusion.generation.worker import EngineWorker
from tests.lmfusion.generation.models import build

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def model(tiny_llama):
    """Random: it writes letters, and draws 8 x 8 pixels of noise."""
    model = build(tiny_llama, torch.float32)
    model.tokenizer.chat_template = CHAT_TEMPLATE
    return model


class Page:
    """A page that is being served, and what is behind it."""

    def __init__(self, model, folder, *, name="tiny", seconds_per_step=0.0, **options):
        """seconds_per_step: what a step of the engine takes at least, for answers that one can watch."""
        from lmfusion.serving.connections import LimitedServer
        from lmfusion.serving.page import create_app

        self.seconds_per_step = seconds_per_step
        self.engine = Engine(model)
        self._step = self.engine.step
        self.engine.step = self._slow_step
        self.worker = EngineWorker(self.engine)
        self.folder = folder
        app = create_app(self.worker, model, folder, name=name, **options)
        self._server = LimitedServer(app, port=0, timeout_graceful_shutdown=1)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        self.wait(lambda: self._server.started)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}/"

    def _slow_step(self):
        time.sleep(self.seconds_per_step)
        return self._step()

    def wait(self, condition, seconds=20):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.01)

    def close(self):
        self.worker.close()
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
