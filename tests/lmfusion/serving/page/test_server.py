"""Tests what the page's server serves and what it refuses."""

import contextlib
import json
import os
import socket
from http.client import HTTPConnection

import httpx
import pytest

from lmfusion.generation.options import Limits
from lmfusion.serving.page import uploads as uploads_module
from lmfusion.serving.page.no_fetch import MAX_REQUEST_BYTES, names_address
from lmfusion.serving.page.settings import build_settings
from lmfusion.serving.page.uploads import MAX_UPLOAD_REQUEST_BYTES, make_room
from tests.lmfusion.data.storage.stored import encoded, picture
from tests.lmfusion.serving.page.conftest import Page

gr = pytest.importorskip("gradio")


PNG = encoded("PNG", picture(0))


@pytest.fixture(scope="module")
def named_client(model, tmp_path_factory):
    """A client of a page that may also be called page.example."""
    page = Page(model, tmp_path_factory.mktemp("named"), allowed_hosts=["page.example"])
    with httpx.Client(base_url=page.url) as client:
        yield client
    page.close()


@pytest.fixture(scope="module")
def client(model, tmp_path_factory):
    page = Page(model, tmp_path_factory.mktemp("page"))
    (page.folder / "images").mkdir()
    (page.folder / "images" / "one.png").write_bytes(b"one")
    (page.folder / "secret.txt").write_text("nobody sees this")
    with httpx.Client(base_url=page.url) as client:
        client.folder, client.server = page.folder, page._server
        yield client
    page.close()


def test_answers_forbid_browsers_to_load_from_elsewhere(client):
    response = client.get("/")
    assert response.status_code == 200 and "default-src 'self'" in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"


def test_only_files_of_the_page_are_given_out(client):
    assert client.get(f"/gradio_api/file={client.folder}/images/one.png").content == b"one"
    for path in ("/etc/passwd", f"{client.folder}/secret.txt", f"{client.folder}/images/../secret.txt", "README.md"):
        response = client.get(f"/gradio_api/file={path}")
        assert response.status_code in (403, 404) and b"nobody" not in response.content, path


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x.png", "HTTPS://example.com/x.png", "ftp://example.com/x"])
def test_no_address_is_fetched(client, address):
    response = client.get(f"/gradio_api/file={address}")
    assert response.status_code == 403 and "not fetched" in response.text
    assert client.get(f"/gradio_api/proxy={address}").status_code == 404


def test_no_message_names_an_address(client):
    file = {"path": "http://example.com/x.png", "meta": {"_type": "gradio.FileData"}}
    body = {"data": [{"text": "x", "files": [file]}], "fn_index": 0, "session_hash": "x"}
    assert client.post("/gradio_api/queue/join", json=body).status_code == 403
    assert names_address([{"a": {"path": " HTTPS://x"}}])
    assert not names_address({"path": "/tmp/x", "text": "http://x"})


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x", "text/plain"])
@pytest.mark.parametrize("route", ["queue/join", "run/predict", "cancel", "reset"])
def test_requests_are_limited_whatever_their_type(client, route, kind):
    body = b"x" * (MAX_REQUEST_BYTES + 1)
    assert client.post(f"/gradio_api/{route}", content=body, headers={"Content-Type": kind}).status_code == 413


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/call/respond"),
        ("POST", "/gradio_api/api/predict"),
        ("POST", "/gradio_api/stream/x"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/login"),
        ("GET", "/gradio_api/dev/reload"),
        ("GET", "/gradio_api/deep_link"),
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/info"),
        ("GET", "/gradio_api/openapi.json"),
        ("GET", "/gradio_api/vibe-code"),
        ("GET", "/docs"),
        ("GET", "/gradio_api/queue/join"),
        ("PUT", "/gradio_api/upload"),
        ("OPTIONS", "/gradio_api/queue/join"),
    ],
)
def test_what_the_page_does_not_use_is_not_there(client, method, path):
    files = {"file": ("x.webm", b"x" * 100)} if method == "POST" else None
    assert client.request(method, path, files=files).status_code == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "http://localhost:3000"},
        {"Origin": "null"},
        {"Origin": "http://{host}.evil.example"},
        {"Origin": "http://{host}1"},
        {"Origin": "chrome-extension://{host}"},
        {"Origin": "http://evil.example@{host}"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"},
    ],
)
@pytest.mark.parametrize("host", [None, "192.168.1.5", "page.example"])
def test_other_sites_cannot_use_the_page(named_client, headers, host):
    host = host or named_client.base_url.netloc.decode()
    headers = {"Host": host} | {key: value.format(host=host) for key, value in headers.items()}
    for method, path in (
        ("GET", "/config"),
        ("GET", "/"),
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/upload"),
        ("OPTIONS", "/gradio_api/queue/join"),
    ):
        response = named_client.request(method, path, headers=headers)
        assert response.status_code == 403 and "another site" in response.text
        assert not any(name.startswith("access-control-") for name in response.headers)


@pytest.mark.parametrize("host", [None, "192.168.1.5", "page.example:8443"])
def test_the_page_itself_may_ask(named_client, host):
    host = host or named_client.base_url.netloc.decode()
    headers = {"Host": host, "Origin": f"https://{host}", "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}
    response = named_client.get("/config", headers=headers)
    assert response.status_code == 200
    assert not any(name.startswith("access-control-") for name in response.headers)
    behind_proxy = {"Host": "127.0.0.1", "Origin": "https://page.example"}
    assert named_client.get("/config", headers=behind_proxy).status_code == 200
    link = {"Host": host, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert named_client.get("/", headers=link).status_code == 200


def test_silent_connections_lock_nobody_out(client, monkeypatch):
    monkeypatch.setattr(client.server._connections, "max_connections", 20)
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(socket.create_connection((client.base_url.host, client.base_url.port), timeout=10))
        with httpx.Client(base_url=client.base_url, timeout=10) as newcomer:
            assert newcomer.get("/config").status_code == 200


def test_a_body_that_does_not_end_is_refused(client, monkeypatch):
    monkeypatch.setattr("lmfusion.serving.bodies.BODY_SECONDS", 0.2)
    connection = HTTPConnection(client.base_url.host, client.base_url.port, timeout=20)
    connection.putrequest("POST", "/gradio_api/queue/join")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b"{")
    assert connection.getresponse().status == 408
    connection.close()


@pytest.mark.parametrize("depth", [100, 100_000])
def test_nested_json_is_refused(client, depth):
    body = b"[" * depth + b"]" * depth
    assert client.post("/gradio_api/queue/join", content=body).status_code == 400


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"[]", "must be a JSON object, got list"),
        (b"null", "must be a JSON object, got NoneType"),
        (b'{"session_hash": "\\ud800", "fn_index": 0, "event_id": "x"}', "valid Unicode"),
        (b'{"session_hash": "x", "fn_index": NaN, "event_id": "x"}', "finite numbers"),
        (b'{"session_hash": "x", "fn_index": 1e999, "event_id": "x"}', "finite numbers"),
        ('{"session_hash": "x"}'.encode("utf-16"), "must be JSON"),
        (b'{"session_hash": "\xff"}', "must be JSON"),
    ],
)
@pytest.mark.parametrize("route", ["cancel", "reset", "queue/join", "run/predict"])
@pytest.mark.parametrize("kind", ["application/json", "text/plain"])
def test_odd_json_is_refused_with_the_common_error_body(client, route, body, message, kind):
    response = client.post(f"/gradio_api/{route}", content=body, headers={"Content-Type": kind})
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert message in error["message"] and response.json()["detail"] == error["message"]


def test_other_names_are_refused(client):
    assert client.get("/", headers={"Host": "rebound.example.com"}).status_code == 400


def upload(client, *files):
    return client.post("/gradio_api/upload", files=[("files", file) for file in files])


def stored(client):
    return sorted(path.name for path in (client.folder / "gradio").rglob("*") if path.is_file())


def test_uploads_are_limited(client):
    assert upload(client, ("x.png", b"x" * (33 * 1024 * 1024))).status_code == 413
    for headers, status in (
        ({"Content-Length": str(MAX_UPLOAD_REQUEST_BYTES + 1)}, 413),
        ({"Transfer-Encoding": "chunked"}, 411),
        ({"Content-Length": "5", "Transfer-Encoding": "chunked"}, 411),
    ):
        connection = HTTPConnection(client.base_url.host, client.base_url.port, timeout=20)
        connection.putrequest("POST", "/gradio_api/upload")
        connection.putheader("Content-Type", "multipart/form-data; boundary=x")
        for header, value in headers.items():
            connection.putheader(header, value)
        connection.endheaders()  # no byte of the body is sent
        assert connection.getresponse().status == status
        connection.close()


@pytest.mark.parametrize("name", ["x.html", "x.js", "x.svg", "x.png", "x.pdf", "x.txt"])
def test_uploads_are_pictures(client, name):
    before = stored(client)
    response = upload(client, ("good.png", PNG), (name, b"<svg onload='alert(1)'>" * 9))
    assert response.status_code == 415 and "must be JPEG, PNG or WEBP" in response.text
    assert stored(client) == before


def test_new_uploads_replace_the_oldest(client, monkeypatch):
    # Multipart adds some hundred bytes to the announced length, so there is room for five files and one request.
    monkeypatch.setattr(uploads_module, "MAX_STORED_BYTES", 5 * len(PNG) + 5 + len(PNG) + 500)
    for i in range(12):
        assert upload(client, (f"{i:02}.png", PNG + bytes([i]))).status_code == 200
        [path] = (client.folder / "gradio").rglob(f"{i:02}.png")
        os.utime(path, (i, i))
    assert stored(client) == [f"{i:02}.png" for i in range(6, 12)]


@pytest.mark.parametrize(
    ("num_bytes", "kept"), [(10, "abc"), (11, "bc"), (50, "bc"), (51, "c"), (70, "c"), (71, ""), (1000, "")]
)
def test_room_is_made_by_deleting_the_oldest_files(tmp_path, monkeypatch, num_bytes, kept):
    monkeypatch.setattr(uploads_module, "MAX_STORED_BYTES", 100)
    for i, (name, size) in enumerate({"c": 30, "a": 40, "b": 20}.items()):
        path = tmp_path / str(i) / name
        path.parent.mkdir()
        path.write_bytes(b"x" * size)
        os.utime(path, ns=(0, ord(name)))
    make_room(tmp_path, num_bytes)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == list(kept)


def test_no_room_has_to_be_made_in_a_missing_folder(tmp_path):
    make_room(tmp_path / "missing", 2**60)
    assert not (tmp_path / "missing").exists()


def test_a_model_without_chat_template(model, tmp_path, monkeypatch):
    from lmfusion.generation.engine import Engine
    from lmfusion.generation.worker import EngineWorker
    from lmfusion.serving.page import build_page

    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    worker = EngineWorker(Engine(model))
    try:
        config = json.dumps(build_page(worker, model, tmp_path).get_config_file(), default=str)
    finally:
        worker.close()
    assert "has no chat template" in config
    with gr.Blocks():
        mode = build_settings(model, worker.engine.limits)["prompt_mode"]
    assert mode.value == "raw_text" and mode.interactive is False


def test_models_of_larger_pictures_offer_sizes(model, monkeypatch):
    monkeypatch.setattr(model.codec.config, "image_size", 64)
    with gr.Blocks():
        settings = build_settings(model, Limits())
    assert [size for _, size in settings["image_size"].choices] == [32, 48, 64, 80, 96, 112, 128]
