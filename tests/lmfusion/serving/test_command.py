"""`lmfusion serve` as a process: it prints its address, answers, ends cleanly, and refuses what cannot work at once."""

import argparse
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from lmfusion.cli import main
from lmfusion.cli.serve import add_arguments
from lmfusion.generation.engine import Engine
from lmfusion.generation.options import Limits
from lmfusion.generation.worker import EngineWorker
from lmfusion.model.modeling import LMFusion
from lmfusion.serving.http.app import build_app
from lmfusion.serving.http.requests import RequestParser
from lmfusion.serving.lifecycle import bind, run_server, url_of
from tests.lmfusion.serving.conftest import CHAT_TEMPLATE

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).resolve().parents[3]
HEADERS = {"Authorization": "Bearer k3y"}


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tiny"
    model.save_pretrained(folder, parts="all")
    return folder


def chunks_of(url, **fields):
    """The data of a streamed answer, as it comes."""
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, **fields}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=HEADERS, timeout=60) as response:
        yield from (line.removeprefix("data: ") for line in response.iter_lines() if line)


def finish_reason(lines):
    *_, last, end = lines
    assert end == "[DONE]"
    return json.loads(last)["choices"][0]["finish_reason"]


@pytest.mark.slow
def test_the_process_says_where_it_is_answers_and_ends_well(folder):
    command = [sys.executable, "-m", "lmfusion", "serve", str(folder), "--port", "0", "--default", "num_steps=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LMFUSION_API_KEY": "k3y\n"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("serving"):
                    break
            assert any("key-value cache" in line for line in lines)
            assert re.fullmatch(r"serving tiny at http://127\.0\.0\.1:\d+ .*\n", lines[-1])
            url = lines[-1].split()[3]
            assert httpx.get(f"{url}/v1/models").status_code == 401
            assert finish_reason(chunks_of(url, draw_first=True, max_tokens=2)) == "length"
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0 and errors.splitlines()[-1] == "lmfusion: the server has ended"


@pytest.mark.parametrize(
    ("number", "seconds", "num_steps", "reason"),
    [(signal.SIGTERM, 0.2, 1000, "cancelled"), (signal.SIGINT, 30, 50, "length")],
    ids=["cancelled", "finished"],
)
def test_running_answers_may_go_on_for_a_while(model, number, seconds, num_steps, reason):
    """Here in this process, which is what gets the signal."""
    worker = EngineWorker(Engine(model, num_slots=1024))
    app = build_app(worker, RequestParser(model, "tiny"))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    received, refused = [], []

    def talk():
        fields = dict(draw_first=True, max_images=1, num_steps=num_steps, max_tokens=2, preview_every=1)
        for i, line in enumerate(chunks_of(url, **fields)):
            received.append(line)
            if i == 2:
                os.kill(os.getpid(), number)
        try:
            httpx.get(url)
        except httpx.TransportError as error:
            refused.append(error)

    client = threading.Thread(target=talk)
    listener = bind("127.0.0.1", 0)
    url = url_of("127.0.0.1", listener)
    run_server(app, worker, listener, shutdown_seconds=seconds, on_ready=client.start)
    client.join(30)
    assert finish_reason(received) == reason and refused
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert worker.stats().problem == "the engine was closed"


def test_without_clients_it_ends_at_once(model):
    worker = EngineWorker(Engine(model, num_slots=256))
    app = build_app(worker, RequestParser(model, "tiny"))
    start = time.monotonic()
    stop = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    run_server(app, worker, bind("127.0.0.1", 0), shutdown_seconds=30, on_ready=stop)
    assert time.monotonic() - start < 10


def run(folder, *arguments):
    return main(["serve", str(folder), "--port", "0", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--default", "num_steps"], "--default must be FIELD=VALUE"),
        (["--default", "steps=3"], "got 'steps'"),
        (["--default", "num_steps=9", "--max-num-steps", "8"], "num_steps must be at most 8 here, got 9"),
        (["--shutdown-seconds", "-1"], "--shutdown-seconds must be at least 0, got -1"),
        (["--max-images", "-1"], "--max-images must be at least 0, got -1"),
        (["--max-tokens", "-1"], "--max-tokens must be at least 0, got -1"),
        (["--max-body-mb", "0"], "max_body_bytes must be at least 1, got 0"),
        (["--max-waiting", "0"], "max_waiting must be at least 1, got 0"),
        (["--max-batch", "0"], "max_batch must be at least 1, got 0"),
        (["--cache-slots", "0"], "num_slots must be at least 1, got 0"),
        (["--host", "256.1.1.1"], "cannot listen on 256.1.1.1, port 0"),
        (["--port", "70000"], "--port must be between 0 and 65535, got 70000"),
        (["--chat-template", "missing.jinja"], "missing.jinja"),
        (["--api-key-file", "missing.key"], "missing.key"),
    ],
)
def test_arguments_that_cannot_work(folder, arguments, message, capsys):
    assert run(folder, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_port_in_use_is_reported_before_the_model_is_loaded(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", str(tmp_path / "no model"), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1, port {port}" in error and "choose another --host or --port" in error


@pytest.mark.parametrize("key", ["", " \n", "kéy", "a\nb"])
def test_keys_that_cannot_be_used(folder, key, tmp_path, capsys, monkeypatch):
    (tmp_path / "key").write_text(key, encoding="utf-8")
    assert run(folder, "--api-key-file", str(tmp_path / "key")) == 2
    assert "must be printable ASCII and not empty" in capsys.readouterr().err
    monkeypatch.setenv("LMFUSION_API_KEY", key)
    assert run(folder) == 2
    error = capsys.readouterr().err
    assert "the API key in LMFUSION_API_KEY must be printable ASCII" in error and (not key.strip() or key not in error)


@pytest.mark.parametrize(("key", "words"), [(None, "WITHOUT ANY KEY"), ("k3y", "with the API key")])
def test_listening_for_others_is_warned_of(folder, key, words, monkeypatch, capsys):
    """The model is missing a template, so that nothing is served."""
    monkeypatch.setattr("lmfusion.cli.serve.load_model", lambda args: _stop())
    if key is not None:
        monkeypatch.setenv("LMFUSION_API_KEY", key)
    assert run(folder, "--host", "0.0.0.0") == 2
    error = capsys.readouterr().err
    assert "0.0.0.0 can be reached from other machines" in error and words in error
    assert run(folder) == 2
    assert "can be reached" not in capsys.readouterr().err


def _stop():
    raise ValueError("enough")


def test_a_model_that_cannot_chat_needs_a_template(tiny_llama, tmp_path, capsys, monkeypatch):
    base = LMFusion.from_llm(tiny_llama, image={"patch_coder": {"kind": "linear"}}, codec={"image_size": 8})
    base.save_pretrained(tmp_path / "base", parts="all")
    assert run(tmp_path / "base") == 2
    assert "must have a chat template" in capsys.readouterr().err
    served = []
    monkeypatch.setattr(
        "lmfusion.serving.lifecycle.run_server", lambda app, worker, *_, **__: (worker.close(), served.append(app))
    )
    (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATE)
    assert run(tmp_path / "base", "--chat-template", str(tmp_path / "chat.jinja")) == 0 and len(served) == 1


def test_what_is_missing_is_named_with_the_way_to_get_it(folder, capsys, monkeypatch):
    for module in ("lmfusion.serving.lifecycle", "lmfusion.serving.connections"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run(folder) == 2
    assert 'uvicorn is not installed); pip install -e ".[serve]"' in capsys.readouterr().err


def test_the_help_and_the_reference_name_the_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    reference = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for action in parser._actions:
        option = action.option_strings[-1] if action.option_strings else "--help"
        assert option == "--help" or option in reference, option
        if isinstance(action.default, int | float):
            assert f"(default: {action.default})" in action.help and option in help_text
    defaults = parser.parse_args(["x"])
    for names in ("max_tokens max_images max_num_steps max_image_size", "max_body_mb", "max_prompt_megapixels"):
        values = ", ".join(str(getattr(defaults, name)) for name in names.split())
        assert re.search(rf"`--{names.split()[-1].replace('_', '-')}.*\({values}\)", reference)


def test_limits_of_the_command_line_are_in_force(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "lmfusion.serving.lifecycle.run_server",
        lambda app, worker, *_, **__: (worker.close(), seen.append((worker.engine.limits, worker.max_waiting))),
    )
    limits = dict(max_new_tokens=1, max_images=2, max_num_steps=3, max_image_size=4, max_prompt_images=5)
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in limits.items() if name != "max_new_tokens"]
    assert run(folder, "--max-tokens=1", *arguments, "--max-waiting=6") == 0
    assert seen == [(Limits(**limits), 6)]
