"""Fixtures: a tiny chat model and its page on a free port of the loopback device."""

import threading
import time

import pytest

from lmfusion.generation.engine import Engine
from lmfusion.generation.worker import EngineWorker
from tests.lmfusion.serving.conftest import build_chat_model, wait_until


@pytest.fixture(scope="module")
def model(tiny_llama):
    """A model of this module's own, which its tests may change."""
    return build_chat_model(tiny_llama)


class Page:
    """A served page with its engine and worker."""

    def __init__(self, model, folder, *, name="tiny", seconds_per_step=0.0, **options):
        """seconds_per_step: minimum time of an engine step, so that a test can watch an answer."""
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
        wait_until(lambda: self._server.started)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}/"

    def _slow_step(self):
        time.sleep(self.seconds_per_step)
        return self._step()

    def close(self):
        self.worker.close()
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
