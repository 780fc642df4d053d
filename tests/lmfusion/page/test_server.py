"""What does the page's server give out, and what does it refuse?"""

import json

import httpx
import pytest

from lmfusion.generation.options import Limits
from lmfusion.page.guard import MAX_REQUEST_BYTES, names_address
from lmfusion.page.settings import build_settings
from tests.lmfusion.page.conftest import Page

gr = pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def client(model, tmp_path_factory):
    page = Page(model, tmp_path_factory.mktemp("page"))
    (page.folder / "pictures").mkdir()
    (page.folder / "pictures" / "one.png").write_bytes(b"one")
    (page.folder / "secret.txt").write_text("nobody sees this")
    with httpx.Client(base_url=page.url) as client:
        client.folder = page.folder
        yield client
    page.close()


def test_answers_forbid_browsers_to_load_from_elsewhere(client):
    response = client.get("/")
    assert response.status_code == 200 and "default-src 'self'" in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"


def test_only_files_of_the_page_are_given_out(client):
    assert client.get(f"/gradio_api/file={client.folder}/pictures/one.png").content == b"one"
    for path in ("/etc/passwd", f"{client.folder}/secret.txt", f"{client.folder}/pictures/../secret.txt", "README.md"):
        response = client.get(f"/gradio_api/file={path}")
        assert response.status_code in (403, 404) and b"nobody" not in response.content, path


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x.png", "HTTPS://example.com/x.png", "ftp://example.com/x"])
def test_no_address_is_fetched(client, address):
    for route in ("file", "proxy"):
        response = client.get(f"/gradio_api/{route}={address}")
        assert response.status_code == 403 and "not fetched" in response.text


def test_no_message_names_an_address(client):
    file = {"path": "http://example.com/x.png", "meta": {"_type": "gradio.FileData"}}
    body = {"data": [{"text": "x", "files": [file]}], "fn_index": 0, "session_hash": "x"}
    assert client.post("/gradio_api/queue/join", json=body).status_code == 403
    assert names_address(json.dumps([{"a": {"path": " HTTPS://x"}}]).encode())
    assert not names_address(json.dumps({"path": "/tmp/x", "text": "http://x"}).encode())
    assert not names_address(b"{")


def test_requests_are_limited(client):
    assert client.post("/gradio_api/queue/join", content=b"x" * (MAX_REQUEST_BYTES + 1)).status_code == 413


def test_other_names_are_refused(client):
    assert client.get("/", headers={"Host": "rebound.example.com"}).status_code == 400


def test_uploads_are_limited(client):
    files = {"files": ("x.png", b"x" * (33 * 1024 * 1024))}
    assert client.post("/gradio_api/upload", files=files).status_code == 413


def test_a_model_without_chat_template(model, tmp_path, monkeypatch):
    from lmfusion.generation.engine import Engine
    from lmfusion.generation.worker import EngineWorker
    from lmfusion.page import build_page

    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    worker = EngineWorker(Engine(model))
    try:
        config = json.dumps(build_page(worker, model, tmp_path).get_config_file(), default=str)
    finally:
        worker.close()
    assert "has no chat template" in config
    with gr.Blocks():
        plain = build_settings(model, worker.engine.limits)["reads"]
    assert plain.value == "plain" and plain.interactive is False


def test_models_of_larger_pictures_offer_sizes(model, monkeypatch):
    monkeypatch.setattr(model.codec.config, "image_size", 64)
    with gr.Blocks():
        settings = build_settings(model, Limits())
    assert [size for _, size in settings["image_size"].choices] == [32, 48, 64, 80, 96, 112, 128]
