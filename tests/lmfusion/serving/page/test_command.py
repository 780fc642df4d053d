"""Tests `lmfusion demo`: the model it makes and the page it opens."""

import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from lmfusion.cli import main
from lmfusion.cli.demo import EXAMPLES


@pytest.fixture
def calls(monkeypatch):
    """The calls that would train a model and open the page, in order."""
    pytest.importorskip("gradio")
    calls = []

    def run_demo(output, overrides):
        calls.append(("made", str(output), list(overrides)))
        return {"text_identical": True}

    def serve_page(worker, model, listener, *, host, name, examples, prompt_mode, allowed_hosts):
        calls.append(("shown", name, examples, prompt_mode))

    class Anything:
        plan = ""

        def __init__(self, *_, **__):
            pass

        def close(self):
            calls.append("closed")

    monkeypatch.setattr("lmfusion.experiments.demo.run.run_demo", run_demo)
    monkeypatch.setattr("lmfusion.serving.page.app.serve_page", serve_page)
    monkeypatch.setattr("lmfusion.generation.engine.Engine", Anything)
    monkeypatch.setattr("lmfusion.generation.worker.EngineWorker", Anything)
    monkeypatch.setattr("lmfusion.cli.demo.load_model", lambda args: calls.append(("loaded", args.model)))
    return calls


def test_without_page_the_chain_alone(calls, tmp_path):
    assert main(["demo", "--no-page", "--output", str(tmp_path), "train.num_steps=5"]) == 0
    assert calls == [("made", str(tmp_path), ["train.num_steps=5"])]


def test_the_demos_model_is_made_once(calls, tmp_path):
    demo = ["demo", "--output", str(tmp_path), "--port", "0"]
    model = tmp_path / "run" / "model"
    shown = [("loaded", str(model)), ("shown", "lmfusion demo", EXAMPLES, "last_message"), "closed"]
    assert main(demo) == 0
    assert calls == [("made", str(tmp_path), []), *shown]
    model.mkdir(parents=True)
    (model / "config.json").touch()
    calls.clear()
    assert main(demo) == 0 and calls == shown
    calls.clear()
    assert main([*demo, "train.num_steps=5"]) == 0 and calls == [("made", str(tmp_path), ["train.num_steps=5"]), *shown]


def test_any_model_is_shown(calls, tmp_path, capsys):
    assert main(["demo", str(tmp_path), "--host", "0.0.0.0", "--port", "0"]) == 0
    assert calls == [("loaded", str(tmp_path)), ("shown", tmp_path.name, (), "conversation"), "closed"]
    assert "everybody who reaches it can use the page" in capsys.readouterr().err


@pytest.mark.parametrize("extra", [["--no-page"], ["train.num_steps=5"]])
def test_a_model_is_not_trained(calls, tmp_path, capsys, extra):
    assert main(["demo", str(tmp_path), *extra]) == 2
    assert "needs the demo's own model" in capsys.readouterr().err and calls == []


def test_what_is_missing_is_reported_before_the_work(calls, tmp_path, capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["demo", "--output", str(tmp_path), "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another --host or --port" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert 'pip install -e ".[page]"' in capsys.readouterr().err
    assert calls == []


def test_from_start_to_end(model, tmp_path):
    pytest.importorskip("gradio")
    model.save_pretrained(tmp_path / "model", parts="all")
    command = [sys.executable, "-m", "lmfusion", "demo", str(tmp_path / "model"), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = next((line for line in process.stdout if line.startswith("open ")), "")
            [address] = re.findall(r"http://127\.0\.0\.1:\d+", line)
            response = httpx.get(f"{address}/config", timeout=60)
            assert response.status_code == 200 and response.json()["title"] == "model"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0 and "Traceback" not in errors
