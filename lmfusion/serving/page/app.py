"""How is the page served? By gradio in a FastAPI app that asks nothing of any other machine."""

import os
import signal
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from lmfusion.generation.previews import preview_map
from lmfusion.serving.page.page import build_page
from lmfusion.serving.page.style import CSS, theme
from lmfusion.serving.page.uploads import MAX_UPLOAD_BYTES

if TYPE_CHECKING:
    import socket

    from fastapi import FastAPI

    from lmfusion.generation.worker import EngineWorker
    from lmfusion.model.modeling import LMFusion


def require_gradio() -> None:
    """Raises ValueError where gradio is not installed."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        missing = f"the page needs gradio ({error.name} is not installed)"
        raise ValueError(f'{missing}; pip install -e ".[page]"') from None


def create_app(
    worker: "EngineWorker",
    model: "LMFusion",
    folder: Path,
    *,
    name: str = "",
    examples: Sequence[str] = (),
    way: str = "conversation",
    allowed_hosts: Collection[str] = (),
) -> "FastAPI":
    """The page at / of an app.

    folder: holds all that is uploaded and drawn; it should be empty, and nobody else's. name: what the title calls the
    model. examples: prompts to click on. way: what the model reads at first, one of `lmfusion.serving.page.settings.WAYS`.
    allowed_hosts: names, besides localhost, by which browsers may call the page.

    Raises ValueError where gradio is not installed.
    """
    require_gradio()
    import gradio as gr
    from fastapi import FastAPI

    from lmfusion.serving.guard import Guard as HostGuard
    from lmfusion.serving.page.guard import PageGuard

    uploads = folder / "gradio"
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)  # gradio can be told in no other way
    page = build_page(worker, model, folder / "pictures", name=name, examples=examples, way=way)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(PageGuard, folder=uploads, allowed_hosts=allowed_hosts)
    app.add_middleware(HostGuard, allowed_hosts=allowed_hosts, on_status=lambda status: None)
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        allowed_paths=[str(folder / "pictures")],
        max_file_size=MAX_UPLOAD_BYTES,
        show_error=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        theme=theme(),
        css=CSS,
    )


def serve_page(
    worker: "EngineWorker",
    model: "LMFusion",
    listener: "socket.socket",
    *,
    host: str,
    name: str = "",
    examples: Sequence[str] = (),
    way: str = "conversation",
    allowed_hosts: Collection[str] = (),
) -> None:
    """Serve the page on a bound socket until Ctrl-C or SIGTERM. Pictures and uploads are forgotten then.

    Raises ValueError where gradio is not installed.
    """
    preview_map(model.codec)  # which may take seconds, before anybody waits for it
    with tempfile.TemporaryDirectory(prefix="lmfusion-page-", ignore_cleanup_errors=True) as folder:
        app = create_app(
            worker, model, Path(folder), name=name, examples=examples, way=way, allowed_hosts=allowed_hosts
        )

        from lmfusion.serving.connections import LimitedServer
        from lmfusion.serving.lifecycle import url_of

        # An open tab is a connection that never ends by itself, so shutdown does not wait for it
        server = LimitedServer(app, timeout_graceful_shutdown=1)

        def stop(number: int, frame: FrameType | None) -> None:
            server.should_exit = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        print(f"open {url_of(host, listener)} in a browser (Ctrl-C ends it)", flush=True)
        try:
            server.run(sockets=[listener])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
